"""The states that a student is trained on: noised data, or its own rollout from pure noise."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import Sampler, rollout
from stepdistill.diffusion.schedule import DiscreteVP, NoiseSchedule, expand
from stepdistill.families.base import Family
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

MIN_ALPHA = 0.01


def student_input(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """``x_t`` (B, ...), and at t = 1 what a sampler starts from: pure noise, in which no data is left to leak."""
    return torch.where(expand(t == 1, x0) > 0, schedule.initial_noise(noise), schedule.add_noise(x0, noise, t))


def backward_simulation(student: Denoiser, sampler: Sampler, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
    """Backward simulation: states (B, ...) of the student's own rollout from pure noise, and their times (B,).

    They are what one of its calls, drawn for the whole batch, is shown when it is used: no gradient and nothing of the
    data is in them.
    """
    start = sampler.schedule.initial_noise(draws.normal_like(batch.x0))
    done = draws.shared_integer(0, sampler.steps)
    with torch.no_grad():
        x_t = rollout(student.conditioned(batch.cond), sampler, start, done, draws.normal_like)
    return x_t, sampler.times[done].expand(batch.size).to(start.device)


def check_first_step(family: Family, t: float = 1.0) -> None:
    """Raise ``ValueError`` for a noise-predicting teacher that cannot tell the clean image in pure noise, at ``t``."""
    alpha_1, _ = family.schedule(torch.tensor([t]))
    if family.prediction_type == "epsilon" and isinstance(family.schedule, DiscreteVP) and alpha_1.item() < MIN_ALPHA:
        raise ValueError(
            f"scheduler.prediction_type: 'epsilon' with alpha_T = {alpha_1.item():.2g} makes the clean image at pure "
            f"noise a division by almost zero; wanted alpha_T of at least {MIN_ALPHA}, or a 'v_prediction' or 'sample' "
            "teacher (progressive distillation makes one of yours), or dmd2 with first_time: 0.4"
        )


def diversity_ratio(fake: Tensor, real: Tensor) -> Tensor:
    """How much images (B, ...) differ among a batch, against real ones: about 1; a fall to 0 is a mode collapse.

    One image differs from nothing, and its 1 says nothing.
    """
    if len(fake) == 1:
        return torch.ones((), device=fake.device)
    spreads = [x.detach().float().flatten(1).var(0, unbiased=False).mean().sqrt() for x in (fake, real)]
    return spreads[0] / spreads[1].clamp(min=1e-6)
