r"""Distribution matching distillation (Yin et al. 2023, arXiv 2311.18828).

A student makes an image of noise in one call. It is trained by the difference of two scores at its own noised images
(:mod:`stepdistill.losses.distribution_matching`): the teacher's, guided or not, and a fake score's, which learns to
denoise the student's images in a turn of its own. Where the images agree in distribution, the scores agree and the
gradient is zero.

Such a gradient prefers modes that the student has to those it lacks. What keeps all of them is regression: on pairs of
noise and the image that the teacher's own deterministic sampler makes of it (:mod:`stepdistill.data.ode_pairs`),

.. math:: L = \tfrac12 \| x - \mathrm{sg}(x - g) \|^2 + \lambda\, d(G(z_{ref}), y_{ref}).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.data.ode_pairs import Pairs
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family
from stepdistill.losses.distribution_matching import (
    MATCHED,
    both_scores,
    denoising_loss,
    diagnostics,
    matching_loss,
    sample_times,
)
from stepdistill.losses.perceptual import Resemblance, check_resemblance, open_resemblance
from stepdistill.losses.student_inputs import check_first_step, diversity_ratio
from stepdistill.methods.base import Distiller, Losses, Turn
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws


class DMD(Distiller):
    """A student of one step, and a fake score that follows it."""

    turn_names = ("student", "fake")
    optim_defaults: ClassVar = {turn: {"weight_decay": 0.01, "clip": 10.0} for turn in turn_names}
    needs_images = False

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of distribution matching distillation."""

        steps: int = 1
        """Network calls of the finished student: one."""
        guidance_scale: float = 1.0
        """Guidance of the teacher whose distribution is matched; 1 is none."""
        pairs: str | None = None
        """Folder of ``scripts/make_pairs.py``; without it there is no regression."""
        regression_weight: float = 0.25
        """What the distance to the teacher's own samples counts for."""
        distance: Resemblance = "features"

        def __post_init__(self) -> None:
            if self.steps != 1:
                raise ValueError(f"steps: found {self.steps}, but DMD's student takes 1; for more steps, name: dmd2")
            if not self.regression_weight > 0:
                raise ValueError(
                    f"regression_weight: found {self.regression_weight}, wanted more than 0; to leave regression out, "
                    "leave out pairs"
                )

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        check_first_step(family)
        family.check_guidance(config.guidance_scale)
        to_diffusers(ConsistencySampler(family.schedule, family.schedule.grid(1)), family.scheduler_config)
        if config.pairs is not None:
            check_resemblance(config.distance)
            Pairs(config.pairs).check_teacher(family)

    def build(self) -> Sequence[Turn]:
        self.bank.fork("fake")
        self.fake = Denoiser(self.family, self.bank, "fake")
        self.pairs = None if self.config.pairs is None else Pairs(self.config.pairs)
        self.resemblance = open_resemblance(self.config.distance, self.teacher)
        return [
            Turn("student", self.bank.params("student"), self.student_loss),
            Turn("fake", self.bank.params("fake"), self.fake_loss),
        ]

    def sampler(self) -> Sampler:
        return ConsistencySampler(self.schedule, self.schedule.grid(1))

    def generate(self, noise: Tensor, cond: Cond) -> Tensor:
        """The student's images (B, ...) of unit noise (B, ...)."""
        return self.student(self.schedule.initial_noise(noise), torch.ones(len(noise), device=noise.device), cond).x0

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x0 = self.generate(draws.normal(*self.family.sample_shape), batch.cond)
        t = sample_times(self.schedule, draws, *MATCHED)
        real, fake = self.scores(x0.detach(), draws.normal_like(x0), t, batch.cond)
        terms = {"matching": matching_loss(x0, real, fake).mean()}
        metrics = diagnostics(x0, real, fake, t)
        if self.pairs is not None:
            terms["regression"] = self.config.regression_weight * self.regression(self.pairs, draws)
        if batch.images is not None:
            metrics["diversity_ratio"] = diversity_ratio(x0, batch.images)
        return Losses(terms, metrics)

    def scores(self, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """The clean images (B, ...) that the real and the fake score see in ``x0``, noised to times (B,)."""
        teacher = self.teacher.guided(cond, self.config.guidance_scale - 1)
        return both_scores(teacher, self.fake, x0, noise, t, cond)

    def regression(self, pairs: Pairs, draws: Draws) -> Tensor:
        """The mean distance between the student's images and the teacher's, of the same noise."""
        noise, images, cond = pairs.rows(draws.rows_of(len(pairs)), draws.device)
        return self.resemblance(self.generate(noise, cond), images, cond).mean()

    def fake_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0 = self.generate(draws.normal(*self.family.sample_shape), batch.cond)
        t = sample_times(self.schedule, draws)
        return Losses({"denoising": denoising_loss(self.fake, x0, draws.normal_like(x0), t, batch.cond).mean()})
