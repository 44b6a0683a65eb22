"""Progressive halving: two steps, or several, of a teacher as one step of the student."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from stepdistill.diffusion.ode import invert_step, ode_step
from stepdistill.diffusion.prediction import Denoise
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.families.base import Family
from stepdistill.losses.consistency import check_intervals

CONVERT = "convert"
"""Name of the stage in which the student of a noise-predicting teacher learns to predict the velocity."""


def two_step_target(
    denoise: Denoise,
    x_t: Tensor,
    t: Tensor,
    t_mid: Tensor,
    s: Tensor,
    schedule: NoiseSchedule,
) -> Tensor:
    """Return the clean image whose DDIM step equals the steps ``t -> t_mid -> s`` (Salimans & Ho 2022, Eq. 8).

    Args:
        denoise: the teacher of the stage, its conditioning fixed.
        x_t: states (B, ...) at ``t``.
        t: times (B,).
        t_mid: times (B,) between.
        s: times (B,) at which both paths end.
        schedule: the networks' schedule.

    Returns:
        Images (B, ...) in float64.
    """
    x_s = walk(denoise, x_t, (t, t_mid, s), schedule)
    return invert_step(x_t, x_s, t, s, schedule)


def walk(denoise: Denoise, x_t: Tensor, times: Sequence[Tensor], schedule: NoiseSchedule) -> Tensor:
    """Return where DDIM steps from ``x_t`` (B, ...), at the first of ``times``, each (B,), to the others lead."""
    for t, s in itertools.pairwise(times):
        x_t = ode_step(denoise(x_t, t), schedule, s)
    return x_t


def needs_velocity(family: Family, steps: int) -> bool:
    """Return whether a student of ``steps`` steps must not predict the noise, as this teacher does.

    One step hangs on the clean image at pure noise alone. Several steps tolerate its error where some signal is left
    there (:meth:`Family.sees_pure_noise`), as in Stable Diffusion.
    """
    return family.prediction_type == "epsilon" and (steps == 1 or not family.sees_pure_noise())


def halvings(start: int, steps: int) -> list[int]:
    """Return the students' numbers of steps, from ``start / 2`` down to ``steps``.

    >>> halvings(32, 4)
    [16, 8, 4]

    Raises:
        ValueError: if ``start`` is not ``steps`` times 2, 4, 8, ...
    """
    ratio, rest = divmod(start, steps) if steps > 0 else (0, 1)
    if rest or ratio < 2 or ratio & (ratio - 1):
        raise ValueError(f"start: expected steps times 2, 4, 8, ..., got start {start}, steps {steps}")
    return [start >> k for k in range(1, ratio.bit_length())]


def ladder(start: int, via: Sequence[int], steps: int) -> tuple[int, ...]:
    """Return the numbers of steps of a teacher, of the students in between, and of the last student.

    >>> ladder(512, (32,), 1)
    (512, 32, 1)

    Raises:
        ValueError: if they do not descend, or one is not a multiple of the next.
    """
    rungs = (start, *via, steps)
    if any(b < 1 or a <= b or a % b for a, b in itertools.pairwise(rungs)):
        raise ValueError(
            "via: expected start, via and steps to descend, each a multiple of the next, for example start 512, "
            f"via [32], steps 1; got {' -> '.join(map(str, rungs))}"
        )
    return rungs


def stage_grid(schedule: NoiseSchedule, start: int, steps: int) -> Tensor:
    """Return ``steps + 1`` of the times of ``schedule.grid(start)``, so that a student's times are its teacher's too.

    It is ``schedule.grid(steps)`` itself except for Karras' grids, which are not nested.

    Raises:
        ValueError: if the teacher has fewer timesteps than ``start``.
    """
    check_intervals(schedule, steps, start, "start")
    return schedule.grid(start)[:: start // steps]
