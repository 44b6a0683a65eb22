r"""Distribution matching distillation (Yin et al. 2023, arXiv 2311.18828).

The student generates an image from noise in one step. Its gradient is the difference of two scores at its own noised
images (:mod:`stepdistill.losses.distribution_matching`): the teacher's, guided or not, and a fake score's, which learns
to denoise the student's images in a turn of its own. Once both distributions agree, the scores agree and the gradient
is zero.

This gradient favours modes that the student already has. A regression loss keeps the others, on pairs of a noise and
the image that the teacher's own deterministic sampler generates from it (:mod:`stepdistill.data.ode_pairs`),

.. math:: L = \tfrac12 \| x - \mathrm{sg}(x - g) \|^2 + \lambda\, d(G(z_{ref}), y_{ref}).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.data.ode_pairs import Pairs
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler
from stepdistill.families.base import Family
from stepdistill.files.places import Place
from stepdistill.files.ranges import GuidanceScale, NonNegativeFloat, PositiveInt
from stepdistill.files.schema import refuse_unread
from stepdistill.losses.distribution_matching import distribution_matching, fake_score_loss
from stepdistill.losses.perceptual import Resemblance, check_resemblance, open_resemblance
from stepdistill.losses.student_inputs import diversity_ratio, unit_noise
from stepdistill.methods.base import Distiller, Losses
from stepdistill.randomness import Draws


class DMD(Distiller):
    """A student of one step, and a fake score that follows it."""

    turn_names = ("student", "fake")
    serves_as_dmd2 = True
    # the rate is that for Stable Diffusion 1.5; the papers' others are 2e-6 (ImageNet) to 5e-5 (CIFAR-10)
    optim_defaults: ClassVar = {turn: {"lr": 1e-5, "weight_decay": 0.01, "clip": 10.0} for turn in turn_names}
    needs_images = False

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of distribution matching distillation."""

        steps: PositiveInt = 1
        """Sampling steps of the finished student: one."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance of the teacher whose distribution is matched; 1 is none."""
        pairs: Place | None = None
        """Folder written by ``scripts/make_pairs.py``; without it there is no regression."""
        regression_weight: NonNegativeFloat = 0.25
        """Weight of the distance to the teacher's own samples."""
        distance: Resemblance = "features"

        def __post_init__(self) -> None:
            if self.steps != 1:
                raise ValueError(f"steps: expected 1, got {self.steps}; for more steps, choose name: dmd2")
            if self.regression_weight == 0:
                raise ValueError(
                    f"regression_weight: expected more than 0, got {self.regression_weight}; to train without "
                    "regression, leave out pairs"
                )
            refuse_unread(self, ["regression_weight", "distance"], self.pairs is None, "without pairs")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return ConsistencySampler(family.schedule, family.schedule.renoising_grid(config.steps))

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        if config.pairs is not None:
            check_resemblance(config.distance)
            if config.distance == "features" and not family.feature_blocks:
                raise ValueError(
                    "method.distance: expected 'pixels' or 'lpips' for a teacher whose blocks are not known, got "
                    "'features'"
                )
            Pairs(config.pairs).check_teacher(family)

    def build(self) -> None:
        self.fake = self.add_role("fake")
        self.pairs = None if self.config.pairs is None else Pairs(self.config.pairs)
        if self.pairs is not None:
            self.versions["method.pairs (version)"] = self.pairs.shards.version
            self.prepared_forwards = self.pairs.forwards
            self.resemblance = open_resemblance(self.config.distance, self.teacher)
        self.add_turn("student", self.student_loss)
        self.add_turn("fake", self.fake_loss)

    def generate(self, noise: Tensor, cond: Cond) -> Tensor:
        """Return the student's images (B, ...) of unit noise (B, ...)."""
        return self.student(self.schedule.initial_noise(noise), torch.ones(len(noise), device=noise.device), cond).x0

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x0 = self.generate(unit_noise(batch, self.family, draws), batch.cond)
        matching, metrics = distribution_matching(self.guided_teacher(batch.cond), self.fake, x0, batch.cond, draws)
        terms = {"matching": matching}
        if self.pairs is not None:
            terms["regression"] = self.config.regression_weight * self.regression(self.pairs, draws)
        if batch.images is not None:
            metrics["diversity_ratio"] = diversity_ratio(x0, batch.images)
        return Losses(terms, metrics)

    def regression(self, pairs: Pairs, draws: Draws) -> Tensor:
        """Return the mean distance between the student's images and the teacher's, of the same noise."""
        noise, images, cond = pairs.rows(draws.rows_of(len(pairs)), draws.device)
        return self.resemblance(self.generate(noise, cond), images, cond).mean()

    def fake_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0 = self.generate(unit_noise(batch, self.family, draws), batch.cond)
        return Losses({"denoising": fake_score_loss(self.fake, x0, batch.cond, draws)})
