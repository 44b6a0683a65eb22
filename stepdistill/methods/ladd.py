r"""Latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015).

The teacher provides the features of the critic. Real images and the student's are noised again, to logit-normal times

.. math:: \hat t = \mathrm{sigmoid}(m + s n), \qquad n \sim N(0, 1),

of a flow (on other schedules: to the same signal-to-noise ratio), and heads on the teacher's blocks tell them apart. A
large ``m`` judges structure, a small ``m`` texture. There is no other loss, no decoding and no second network. The best
training images are the teacher's own samples at a good guidance scale, because they match their conditions.

The paper leaves two choices open. The loss here is the hinge loss, as in SANA-Sprint (arXiv 2503.09641), which follows
LADD. R1 is off by default, and approximated by finite differences of the logits, as in NVIDIA's FastGen.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler
from stepdistill.discriminators.critics import RenoisedCritic
from stepdistill.discriminators.feature_sources import MAX_BLOCKS
from stepdistill.families.base import Family
from stepdistill.files.ranges import (
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
)
from stepdistill.files.schema import refuse_unread
from stepdistill.losses.adversarial import AdversarialLoss
from stepdistill.losses.student_inputs import diversity_ratio, student_input
from stepdistill.methods.base import Distiller, Losses, last_of
from stepdistill.randomness import Draws


class LADD(Distiller):
    """A student, and a critic on its teacher's features."""

    turn_names = ("student", "critic")
    optim_defaults: ClassVar = {"critic": {"betas": (0.0, 0.99)}}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of latent adversarial diffusion distillation."""

        steps: PositiveInt = 4
        """Sampling steps of the finished student."""
        first_share: PositiveShare = 0.7
        """Share of training at pure noise; the rest is divided evenly among the student's other times."""
        warmup: NonNegativeInt = 500
        """Training steps at the less noisy half of its times only, for a student of several steps."""
        location: FiniteFloat = 1.0
        """``m`` of the noise levels at which the critic judges."""
        scale: PositiveFloat = 1.0
        """``s`` of the noise levels at which the critic judges."""
        adversarial: AdversarialLoss = "hinge"
        r1: NonNegativeFloat = 0.0
        """Weight of the approximate R1; FastGen, which does not divide by the squared distance, has 0.001 to 10."""
        r1_distance: PositiveFloat = 0.1
        """Distance of R1's finite difference, in standard deviations of noise on a real image."""
        max_blocks: PositiveInt = MAX_BLOCKS
        """Most blocks of the teacher that the critic has a head on, evenly spaced."""
        student_update_interval: PositiveInt = 4
        """The student is updated on every n-th step, the critic on each."""
        critic_warmup: NonNegativeInt = 50
        """Training steps of the critic alone, before the student's first: it must know the student to lead it."""

        def __post_init__(self) -> None:
            refuse_unread(self, ["r1_distance"], not self.r1, "without r1")
            refuse_unread(self, ["first_share", "warmup"], self.steps == 1, "with one step")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return ConsistencySampler(family.schedule, family.schedule.renoising_grid(config.steps))

    def build(self) -> None:
        config = self.config
        critic = RenoisedCritic(
            self.teacher, config.location, config.scale,
            loss=config.adversarial, r1_weight=config.r1, r1_distance=config.r1_distance,
            max_blocks=config.max_blocks,
        )  # fmt: skip
        self.add_turn("student", self.student_loss, when=last_of(config.student_update_interval, config.critic_warmup))
        self.critic = self.add_critic(critic, self.critic_loss)

    def shares(self) -> Tensor:
        """Return the probability of each of the student's times, (steps,), at the present training step."""
        steps, first = self.config.steps, self.config.first_share
        if steps == 1:
            return torch.ones(1, dtype=torch.float64)
        if self.step_in_stage < self.config.warmup:
            late = torch.arange(steps) >= steps // 2
            return late / late.sum().double()
        return torch.tensor([first, *[(1 - first) / (steps - 1)] * (steps - 1)], dtype=torch.float64)

    def generate(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return the student's clean images (B, ...), and the times (B,) of its inputs."""
        boundaries = self.shares().cumsum(0).to(draws.device)[:-1]
        times = self.times(self.schedule.renoising_grid, self.config.steps, draws.device)
        t = times[torch.searchsorted(boundaries, draws.uniform(), right=True)]
        x_t = student_input(self.schedule, batch.x0, draws.normal_like(batch.x0), t)
        return self.student(x_t, t, batch.cond).x0, t

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x0, t = self.generate(batch, draws)
        loss = self.critic.student_loss(self.critic.see(x0), batch, t, draws)
        return Losses({"loss": loss}, {"diversity_ratio": diversity_ratio(x0, batch.x0)})

    def critic_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0, t = self.generate(batch, draws)
        return Losses(*self.critic.critic_loss(x0, batch, t, draws))
