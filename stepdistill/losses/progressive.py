"""What progressive and guided distillation share: two steps of a mentor as one, and a stage a halving."""

from __future__ import annotations

from torch import Tensor

from stepdistill.diffusion.ode import invert_step, ode_step
from stepdistill.diffusion.prediction import Denoise
from stepdistill.diffusion.schedule import NoiseSchedule


def two_step_target(
    denoise: Denoise,
    x_t: Tensor,
    t: Tensor,
    t_mid: Tensor,
    s: Tensor,
    schedule: NoiseSchedule,
) -> Tensor:
    """Two DDIM steps ``t -> t_mid -> s`` as the clean image of one (Salimans & Ho 2022, Eq. 8), float64.

    Args:
        denoise: the mentor, its conditioning bound.
        x_t: states (B, ...) at ``t``.
        t: times (B,).
        t_mid: times (B,) between.
        s: times (B,) where both roads end.
        schedule: the networks' schedule.
    """
    x_mid = ode_step(denoise(x_t, t), schedule, t_mid)
    x_s = ode_step(denoise(x_mid, t_mid), schedule, s)
    return invert_step(x_t, x_s, t, s, schedule)


def halvings(start: int, steps: int) -> list[int]:
    """The students' numbers of steps, from ``start / 2`` down to ``steps``.

    >>> halvings(32, 4)
    [16, 8, 4]

    Raises:
        ValueError: if ``start`` is not ``steps`` times 2, 4, 8, ...
    """
    ratio, rest = divmod(start, steps) if steps > 0 else (0, 1)
    if rest or ratio < 2 or ratio & (ratio - 1):
        raise ValueError(f"start must be steps times 2, 4, 8, ...; found start {start}, steps {steps}")
    return [start >> k for k in range(1, ratio.bit_length())]


def nested_grid(schedule: NoiseSchedule, start: int, steps: int) -> Tensor:
    """``steps + 1`` of the times of the first mentor's grid: what a student steps on, its mentor steps on too.

    It is ``schedule.grid(steps)`` itself except for Karras' grids, which are not nested.
    """
    return schedule.grid(start)[:: start // steps]
