r"""Improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

DMD (:mod:`stepdistill.methods.dmd`) without its pairs. Four changes:

- *Two time scales*: the fake score moves several times for every move of the student, so that its score is true; this
  is what regression was needed for (Section 4.2).
- *A critic*: a head on the fake score's bottleneck tells real images from the student's, both noised,

  .. math:: L_D = \mathrm{softplus}(-D(x_t)) + \mathrm{softplus}(D(\hat x_t)), \quad
      L_G = \mathrm{softplus}(-D(\hat x_t)),

  so that the student can become better than a teacher whose score is not perfect (Section 4.3).
- *Several steps*, by re-noising the student's own clean image (Section 4.4).
- *Backward simulation*: what the student is shown in training at a later step is the end of its own rollout from pure
  noise, without gradient, as when it is used; never a noised real image (Section 4.5).

Teacher, student, fake score and critic are one network and two adapters under the adapter bank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.discriminators.conditioning import check_classes
from stepdistill.discriminators.heads import BottleneckHead
from stepdistill.families.base import Family
from stepdistill.losses.adversarial import Logits, critic_loss, critic_metrics, generator_loss
from stepdistill.losses.distribution_matching import (
    MATCHED,
    both_scores,
    denoising_loss,
    diagnostics,
    eval_mode,
    matching_loss,
    sample_times,
)
from stepdistill.losses.student_inputs import backward_simulation, check_first_step, diversity_ratio
from stepdistill.methods.base import Distiller, Losses, Turn
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import BlockFeatures
from stepdistill.randomness import Draws


class DMD2(Distiller):
    """A student of one or a few steps, a fake score that follows it closely, and a head on that."""

    turn_names = ("student", "fake")
    optim_defaults: ClassVar = {turn: {"weight_decay": 0.01, "clip": 10.0} for turn in turn_names}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of improved distribution matching distillation."""

        steps: int = 4
        """Network calls of the finished student."""
        guidance_scale: float = 1.0
        """Guidance of the teacher whose distribution is matched; 1 is none."""
        student_update_interval: int = 5
        """The student is updated on every n-th step; the paper has 5, and 10 for Stable Diffusion."""
        fake_update: Literal["both", "alternate"] = "both"
        """On the student's steps the fake score moves too (the paper's code), or rests (NVIDIA's FastGen)."""
        gan_weight: float = 3e-3
        """What the critic's word counts for in the student's loss; 0, and there is no critic."""
        critic_weight: float = 1e-2
        """What the critic's loss counts for beside the fake score's."""
        first_time: float = 1.0
        """Time of the first call, which is shown pure noise all the same; 0.4 for one step of SDXL (timestep 399)."""

        def __post_init__(self) -> None:
            if min(self.steps, self.student_update_interval) < 1:
                raise ValueError(
                    f"expected steps, student_update_interval >= 1, got {self.steps}, {self.student_update_interval}"
                )
            if self.fake_update == "alternate" and self.student_update_interval == 1:
                raise ValueError(
                    "fake_update: 'alternate' expects student_update_interval >= 2, or the fake score has no step"
                )
            if not 0 < self.first_time <= 1:
                raise ValueError(f"first_time: expected 0 < first_time <= 1, got {self.first_time}")
            if not (self.gan_weight >= 0 and self.critic_weight > 0):
                raise ValueError(
                    f"wanted gan_weight >= 0, critic_weight > 0; found {self.gan_weight}, {self.critic_weight}"
                )

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        check_first_step(family, config.first_time)
        family.check_guidance(config.guidance_scale)
        family.check_sampler(make_sampler(family.schedule, config))

    def build(self) -> Sequence[Turn]:
        self.bank.fork("fake")
        self.fake = Denoiser(self.family, self.bank, "fake")
        params = self.bank.params("fake")
        if self.config.gan_weight:
            self.bottleneck = BlockFeatures(self.fake, self.family.feature_blocks[-1:])
            self.head = BottleneckHead(self.bottleneck.shapes()[-1])
            params = [*params, *self.head.parameters()]
        return [
            Turn("student", self.bank.params("student"), self.student_loss, self.student_moves),
            Turn("fake", params, self.fake_loss, self.fake_moves),
        ]

    def student_moves(self, step: int) -> bool:
        """The last step of every interval: the fake score goes first."""
        return step % self.config.student_update_interval == self.config.student_update_interval - 1

    def fake_moves(self, step: int) -> bool:
        """Every step, unless the turns alternate."""
        return self.config.fake_update == "both" or not self.student_moves(step)

    def sampler(self) -> Sampler:
        return make_sampler(self.schedule, self.config)

    # ------------------------------------------------------------------------------------------------- student

    def generate(self, batch: Batch, draws: Draws) -> Tensor:
        """The student's clean images (B, ...), of its own rollout (backward simulation)."""
        x_t, t = backward_simulation(self.student, self.sampler(), batch, draws)
        return self.student(x_t, t, batch.cond).x0

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x0 = self.generate(batch, draws)
        t = sample_times(self.schedule, draws, *MATCHED)
        real, fake = self.scores(x0.detach(), draws.normal_like(x0), t, batch.cond)
        terms = {"matching": matching_loss(x0, real, fake).mean()}
        if self.config.gan_weight:
            with eval_mode(self.fake):
                (logits,) = self.critic([x0], batch.cond, draws)
            terms["gan"] = self.config.gan_weight * generator_loss(logits, "softplus")
        return Losses(terms, diagnostics(x0, real, fake, t) | {"diversity_ratio": diversity_ratio(x0, batch.x0)})

    def scores(self, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The clean images (B, ...) that the real and the fake score see in ``x0``, noised to times (B,)."""
        teacher = self.teacher.guided(cond, self.config.guidance_scale - 1)
        return both_scores(teacher, self.fake, x0, noise, t, cond)

    # --------------------------------------------------------------------------------- fake score and critic

    def fake_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0 = self.generate(batch, draws)
        t = sample_times(self.schedule, draws)
        terms = {"denoising": denoising_loss(self.fake, x0, draws.normal_like(x0), t, batch.cond).mean()}
        if not self.config.gan_weight:
            return Losses(terms)
        if self.step_in_stage == 0:
            check_classes(batch.cond, self.family.num_classes)
        real, fake = self.critic([batch.x0, x0], batch.cond, draws)
        terms["critic"] = self.config.critic_weight * critic_loss(real, fake, "softplus")
        return Losses(terms, critic_metrics(real, fake))

    def critic(self, images: Sequence[Tensor], cond: Cond, draws: Draws) -> list[Logits]:
        """The head's logits of each of several batches of clean images (B, ...), noised to times of their own."""
        t = torch.cat([sample_times(self.schedule, draws) for _ in images])
        noise = torch.cat([draws.normal_like(x0) for x0 in images])
        x_t = self.schedule.add_noise(torch.cat(list(images)), noise, t)
        feature = self.bottleneck(x_t, t, {name: torch.cat([c] * len(images)) for name, c in cond.items()})[-1]
        return [[part] for part in self.head(feature).chunk(len(images))]


def make_sampler(schedule: NoiseSchedule, config: Any) -> Sampler:
    """Re-noising on the schedule's grid, its first time moved to ``config.first_time``."""
    times = schedule.grid(config.steps)
    return ConsistencySampler(schedule, torch.cat([torch.tensor([config.first_time], dtype=times.dtype), times[1:]]))
