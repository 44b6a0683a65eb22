"""The inputs that a student is trained on: noised data, or its own samples on the way from pure noise."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import Sampler, rollout
from stepdistill.diffusion.schedule import NoiseSchedule, expand
from stepdistill.families.base import MIN_ALPHA, Family
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws


def student_input(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return ``x_t`` (B, ...), where t = 1 is a sampler's initial state: pure noise, into which no data can leak."""
    return torch.where(expand(t == 1, x0) > 0, schedule.initial_noise(noise), schedule.add_noise(x0, noise, t))


def backward_simulation(student: Denoiser, sampler: Sampler, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
    """Return the student's inputs (B, ...) at one of its sampling steps, and their times (B,).

    The step is drawn at random for the whole batch, and the student itself sampled the inputs from pure noise. They
    depend on no data, and carry no gradient.
    """
    start = sampler.schedule.initial_noise(draws.normal_like(batch.x0))
    step = draws.shared_integer(0, sampler.steps)
    with torch.no_grad():
        x_t = rollout(student.conditioned(batch.cond), sampler, start, step, draws.normal_like)
    return x_t, sampler.times[step].expand(batch.size).to(start.device)


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
