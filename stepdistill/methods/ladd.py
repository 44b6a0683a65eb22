r"""Latent adversarial diffusion distillation (Sauer et al. 2024, arXiv 2403.12015).

The teacher is also the critic's eyes. Real images and a student's are noised again, to levels that are logit-normal,

.. math:: \hat t = \mathrm{sigmoid}(m + s n), \qquad n \sim N(0, 1),

in a flow's time (and at the same signal-to-noise ratio on other schedules), and heads on the teacher's own blocks tell
them apart. Large ``m`` judges structure, small ``m`` texture. There is no other loss, no decoding, no second network:
the images to learn from are best the teacher's own samples at a good guidance scale, whose condition they follow.

What the paper leaves open and is chosen here: the hinge loss (SANA-Sprint, arXiv 2503.09641, which follows LADD), and
R1, off by default and approximated by finite differences of the logits (as NVIDIA's FastGen does).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.discriminators.conditioning import check_classes
from stepdistill.discriminators.critics import RenoisedCritic
from stepdistill.families.base import Family
from stepdistill.losses.adversarial import AdversarialLoss, critic_loss, critic_metrics, generator_loss
from stepdistill.losses.student_inputs import check_first_step, diversity_ratio, student_input
from stepdistill.methods.base import Distiller, Losses, Turn
from stepdistill.randomness import Draws


class LADD(Distiller):
    """A student, and heads on its teacher's features."""

    turn_names = ("student", "critic")
    optim_defaults: ClassVar = {"critic": {"betas": (0.0, 0.99)}}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of latent adversarial diffusion distillation."""

        steps: int = 4
        """Network calls of the finished student."""
        first_share: float = 0.7
        """How often the student is asked at pure noise; the rest is spread evenly over its other times."""
        warmup: int = 500
        """Training steps in which it is asked at the less noisy half of its times only, where there are several."""
        location: float = 1.0
        """``m`` of the noise levels at which the critic looks."""
        scale: float = 1.0
        """``s`` of the noise levels at which the critic looks."""
        adversarial: AdversarialLoss = "hinge"
        r1: float = 0.0
        """Weight of the approximate R1; FastGen takes 0.1 to 1000."""
        r1_distance: float = 0.1
        """How far, in standard deviations of noise on a real image, R1's finite difference reaches."""
        student_update_interval: int = 1
        """The student is updated on every n-th step, the critic on each."""

        def __post_init__(self) -> None:
            if min(self.steps, self.student_update_interval) < 1:
                raise ValueError(
                    f"expected steps, student_update_interval >= 1, got {self.steps}, {self.student_update_interval}"
                )
            if not 0 < self.first_share <= 1:
                raise ValueError(f"first_share: found {self.first_share}, wanted 0 < first_share <= 1")
            if not (self.scale > 0 and self.r1_distance > 0 and self.r1 >= 0):
                raise ValueError("wanted scale, r1_distance > 0 and r1 >= 0")

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        check_first_step(family)
        to_diffusers(ConsistencySampler(family.schedule, family.schedule.grid(config.steps)), family.scheduler_config)

    def build(self) -> Sequence[Turn]:
        self.critic = RenoisedCritic(self.teacher, self.config.location, self.config.scale)
        return [
            Turn(
                "student",
                self.bank.params("student"),
                self.student_loss,
                lambda step: step % self.config.student_update_interval == 0,
            ),
            Turn("critic", list(self.critic.parameters()), self.critic_loss),
        ]

    def sampler(self) -> Sampler:
        return ConsistencySampler(self.schedule, self.schedule.grid(self.config.steps))

    def shares(self) -> Tensor:
        """How often each of the student's times is asked for, (steps,), at the present training step."""
        steps = self.config.steps
        if steps == 1:
            return torch.ones(1, dtype=torch.float64)
        shares = torch.full((steps,), (1 - self.config.first_share) / (steps - 1), dtype=torch.float64)
        shares[0] = self.config.first_share
        late = torch.arange(steps) >= steps // 2
        return late / late.sum().double() if self.step_in_stage < self.config.warmup else shares

    def generate(self, batch: Batch, draws: Draws) -> Tensor:
        """The student's clean images (B, ...)."""
        edges = self.shares().cumsum(0).to(batch.x0.device)[:-1]
        t = self.sampler().times.to(batch.x0.device)[torch.searchsorted(edges, draws.uniform(), right=True)]
        x_t = student_input(self.schedule, batch.x0, draws.normal_like(batch.x0), t)
        return self.student(x_t, t, batch.cond).x0

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x0 = self.generate(batch, draws)
        logits = self.critic(x0, batch.cond, self.critic.view(batch, draws), draws)
        loss = generator_loss(logits, self.config.adversarial)
        return Losses({"loss": loss}, {"diversity_ratio": diversity_ratio(x0, batch.x0)})

    def critic_loss(self, batch: Batch, draws: Draws) -> Losses:
        if self.step_in_stage == 0:
            check_classes(batch.cond, self.family.num_classes)
        with torch.no_grad():
            x0 = self.generate(batch, draws)
        t = self.critic.view(batch, draws)
        real, fake = (self.critic(x, batch.cond, t, draws) for x in (batch.x0, x0))
        terms = {"loss": critic_loss(real, fake, self.config.adversarial)}
        if self.config.r1:
            terms["r1"] = self.config.r1 * self.critic.r1(batch.x0, batch.cond, t, draws, self.config.r1_distance)
        return Losses(terms, critic_metrics(real, fake))
