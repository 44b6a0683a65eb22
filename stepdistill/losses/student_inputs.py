"""The inputs that a student is trained on: noised data, or its own samples on the way from pure noise."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.ode import invert_step, ode_step
from stepdistill.diffusion.prediction import Denoise
from stepdistill.diffusion.samplers import DDIM, Sampler, Visit, rollout, visits
from stepdistill.diffusion.schedule import NoiseSchedule, expand
from stepdistill.families.base import MIN_ALPHA, Family
from stepdistill.losses.consistency import check_intervals
from stepdistill.losses.regression import mean_square
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws


def unit_noise(batch: Batch, family: Family, draws: Draws) -> Tensor:
    """Return unit noise (B, ...) of the size of a batch's images; of the teacher's, if it has none."""
    return draws.normal(*family.sample_shape) if batch.images is None else draws.normal_like(batch.images)


def student_input(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return ``x_t`` (B, ...), where t = 1 is a sampler's initial state: pure noise, into which no data can leak."""
    return torch.where(expand(t == 1, x0) > 0, schedule.initial_noise(noise), schedule.add_noise(x0, noise, t))


def begun_at(schedule: NoiseSchedule, grid: Tensor, first: float) -> Tensor:
    """Return the times of a sampler whose first step, though its input is pure noise, is told the time ``first``.

    Args:
        schedule: the networks' schedule.
        grid: n + 1 descending times from 1 to 0.
        first: in (0, 1].

    Raises:
        ValueError: if ``first`` is not above the second time, or of a discrete process no whole timestep.
    """
    if first <= grid[1].item():
        raise ValueError(
            f"method.first_time: expected above {grid[1].item():.4g}, where the second step begins, got {first}"
        )
    whole = schedule.shortened(grid.new_tensor(first), 1.0)[1].item()
    if abs(whole - first) > 1e-9:
        raise ValueError(f"method.first_time: expected whole timesteps, such as {whole:.10g}, got {first}")
    return torch.cat([grid.new_tensor([first]), grid[1:]])


def simulation(
    student: Denoiser, sampler: Sampler, start: Tensor, cond: Cond, draws: Draws, *, fewest: int = 1,
    learns_at: Collection[int] = (),
) -> list[Visit]:  # fmt: skip
    """Return what the student sees and predicts on its way from pure noise to one of its sampling steps.

    The last prediction is at a step that is drawn at random for the whole batch, and carries a gradient.

    Args:
        student: the student.
        sampler: its sampler.
        start: the sampler's initial states (B, ...).
        cond: conditioning of the batch.
        draws: source of the step and of the sampler's noise.
        fewest: least number of calls, 1 to the sampler's steps.
        learns_at: other calls whose predictions carry a gradient.
    """
    calls = draws.shared_integer(fewest - 1, sampler.steps) + 1
    learns = {*learns_at, calls - 1}
    return visits(student.conditioned(cond), sampler, start, calls, draws.normal_like, learns_at=learns)


@torch.no_grad()
def off_trajectory(visit: Visit, schedule: NoiseSchedule, s: Tensor) -> Tensor:
    """Return where the straight continuation of a student's step leads at times ``s`` (B,), which no step ends at."""
    return ode_step(visit.prediction, schedule, s)


def landing_loss(teacher: Denoise, schedule: NoiseSchedule, first: Visit, steps: int, of: int) -> Tensor:
    """Return the mean squared error of the clean image whose one step from pure noise lands where the teacher does.

    On a flow it is the error of the velocity, as in DP-DMD (arXiv 2602.03139).

    Args:
        teacher: the teacher, its conditioning and guidance fixed.
        schedule: its schedule.
        first: the student at pure noise.
        steps: DDIM steps of the teacher from the same noise.
        of: number of steps of its whole way from noise to data.
    """
    ddim = DDIM(schedule, schedule.grid(of))
    with torch.no_grad():
        landed = rollout(teacher, ddim, first.x_t, steps, torch.zeros_like)
    end = torch.full_like(first.t, ddim.times[steps].item())
    return mean_square(first.prediction.x0, invert_step(first.x_t, landed, first.t, end, schedule)).mean()


def check_landing(schedule: NoiseSchedule, of: int) -> None:
    """Raise ``ValueError`` unless the teacher has as many steps as :func:`landing_loss` counts to data."""
    check_intervals(schedule, 1, of, "anchor_steps")


def check_first_step(family: Family, t: float = 1.0) -> None:
    """Raise ``ValueError`` for a teacher that cannot predict the clean image in pure noise, at time ``t``."""
    if family.sees_pure_noise(t):
        return
    alpha_t, _ = family.schedule(torch.tensor([t]))
    raise ValueError(
        f"scheduler.prediction_type: 'epsilon' with alpha_T = {alpha_t.item():.2g} makes the clean image at pure noise "
        f"a division by almost zero; expected alpha_T of at least {MIN_ALPHA}, or a 'v_prediction' or 'sample' teacher "
        "(progressive distillation converts yours), or dmd2 with first_time: 0.4"
    )


def diversity_ratio(fake: Tensor, real: Tensor) -> Tensor:
    """Return how much generated images (B, ...) differ within a batch, relative to real ones; 0 is a mode collapse.

    For a batch of one image it is 1.
    """
    if len(fake) == 1:
        return torch.ones((), device=fake.device)
    return _spread(fake) / _spread(real).clamp(min=1e-6)


def _spread(x: Tensor) -> Tensor:
    """Root mean variance over the batch."""
    return x.detach().float().flatten(1).var(0, unbiased=False).mean().sqrt()
