r"""Improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

DMD (:mod:`stepdistill.methods.dmd`) without its regression on pairs. Four things are new:

- *Two time scales*: the fake score is updated several times for every update of the student, so that it stays accurate.
  This replaces the regression (Section 4.2).
- *A critic*: a head on the fake score's bottleneck tells real images from the student's, both with noise,

  .. math:: L_D = \mathrm{softplus}(-D(x_t)) + \mathrm{softplus}(D(\hat x_t)), \quad
      L_G = \mathrm{softplus}(-D(\hat x_t)),

  so that the student can become better than its teacher, whose score is not exact (Section 4.3).
- *Several steps*: the student's clean image is noised again, and is the input of the next step (Section 4.4).
- *Backward simulation*: in training too, the input of a later step is the student's own output after the steps before
  it, from pure noise and without gradient; never a noised real image (Section 4.5).

Under the adapter bank, teacher, student, fake score and critic are one network and two adapters.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler
from stepdistill.discriminators.bottleneck import BottleneckCritic
from stepdistill.families.base import Family
from stepdistill.files import ranges
from stepdistill.losses.distribution_matching import distribution_matching, fake_score_loss
from stepdistill.losses.student_inputs import backward_simulation, diversity_ratio
from stepdistill.methods.base import Distiller, Losses, last_of
from stepdistill.randomness import Draws


class DMD2(Distiller):
    """A student of one or a few steps, a fake score that follows it closely, and a critic on the fake score."""

    turn_names = ("student", "fake")
    heads: ClassVar = {"head": "fake"}
    optim_defaults: ClassVar = {turn: {"weight_decay": 0.01, "clip": 10.0} for turn in turn_names}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of improved distribution matching distillation."""

        steps: ranges.PositiveInt = 4
        """Sampling steps of the finished student."""
        guidance_scale: ranges.GuidanceScale = 1.0
        """Guidance of the teacher whose distribution is matched; 1 is none."""
        student_update_interval: ranges.PositiveInt = 5
        """The student is updated on every n-th step; the paper has 5, and 10 for Stable Diffusion."""
        fake_update: Literal["both", "alternate"] = "both"
        """On the student's steps the fake score is updated too (the paper's code), or not (NVIDIA's FastGen)."""
        gan_weight: ranges.NonNegativeFloat = 3e-3
        """Weight of the adversarial loss of the student; at 0 there is no critic."""
        critic_weight: ranges.PositiveFloat = 1e-2
        """Weight of the critic's loss, relative to the fake score's."""
        first_time: ranges.PositiveShare = 1.0
        """Time the first step is told, though its input is pure noise; 0.4 (timestep 399) for one step of SDXL."""

        def __post_init__(self) -> None:
            if self.fake_update == "alternate" and self.student_update_interval == 1:
                raise ValueError(
                    "fake_update: 'alternate' expects student_update_interval >= 2, or the fake score has no step"
                )

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        times = family.schedule.renoising_grid(config.steps).clone()
        times[0] = config.first_time
        return ConsistencySampler(family.schedule, times)

    def build(self) -> None:
        self.fake = self.add_role("fake")
        if self.config.gan_weight:
            self.conditional_critic = True
            self.critic = BottleneckCritic(self.fake)
            self.head = self.critic.head  # a module of the method, so that it is saved
        self.add_turn("student", self.student_loss, when=self.updates_student)
        head = list(self.head.parameters()) if self.config.gan_weight else []
        self.add_turn("fake", self.fake_loss, when=self.updates_fake, head=head)

    def updates_student(self, step: int) -> bool:
        """Return whether ``step`` is the last of an interval: the fake score comes first."""
        return last_of(self.config.student_update_interval)(step)

    def updates_fake(self, step: int) -> bool:
        """Return True on every step, or if the turns alternate on all steps but the student's."""
        return self.config.fake_update == "both" or not self.updates_student(step)

    def generate(self, batch: Batch, draws: Draws) -> Tensor:
        """Return the student's clean images (B, ...) at a random step of its own backward simulation."""
        x_t, t = backward_simulation(self.student, self.sampler(), batch, draws)
        return self.student(x_t, t, batch.cond).x0

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x0 = self.generate(batch, draws)
        matching, metrics = distribution_matching(self.guided_teacher(batch.cond), self.fake, x0, batch.cond, draws)
        terms = {"matching": matching}
        if self.config.gan_weight:
            terms["gan"] = self.config.gan_weight * self.critic.generator_loss(x0, batch.cond, draws)
        return Losses(terms, metrics | {"diversity_ratio": diversity_ratio(x0, batch.x0)})

    def fake_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0 = self.generate(batch, draws)
        terms = {"denoising": fake_score_loss(self.fake, x0, batch.cond, draws)}
        if not self.config.gan_weight:
            return Losses(terms)
        critic, metrics = self.critic.critic_loss(batch.x0, x0, batch.cond, draws)
        return Losses(terms | {"critic": self.config.critic_weight * critic}, metrics)
