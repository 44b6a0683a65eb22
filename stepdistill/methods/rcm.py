r"""Score-regularised continuous-time consistency (rCM, arXiv 2510.08431): sCM and distribution matching together.

A consistency loss (:mod:`stepdistill.methods.scm`) covers the teacher's whole distribution, but leaves detail blurred.
Distribution matching (:mod:`stepdistill.methods.dmd2`) is sharp, but drops modes. The two losses are added,

.. math:: L = \lambda_{sCM} L_{sCM}(x_t, t) + \lambda_{DMD} L_{DMD}(\hat x),

the first at noised data, the second at the end of the student's own way from noise, along a schedule of 1 to n random
times. A fake score learns on all steps but the student's. While the tangent warms up, the student is trained in every
step by the first loss alone.

Nothing is shared between the two: they look at different states. A step of the student therefore takes two of its
passes with gradient, the derivative of one of them and the rollout, the teacher for both, and the fake score once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler
from stepdistill.diffusion.schedule import Karras
from stepdistill.diffusion.shift import shifted
from stepdistill.families.base import Family
from stepdistill.files.ranges import FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from stepdistill.files.schema import refuse_unread
from stepdistill.losses import levels
from stepdistill.losses.distribution_matching import Matching, fake_score_loss
from stepdistill.losses.self_consistency import (
    ConsistencyOptions,
    SelfConsistency,
    TimeWeight,
    angle_grid,
    angle_sampler,
    check_derivative,
)
from stepdistill.losses.student_inputs import check_first_step, diversity_ratio, simulation
from stepdistill.methods.base import Distiller, Losses, last_of
from stepdistill.randomness import Draws

ANGLES = (math.atan(80), 1.5, 1.4, 1.0)
"""TrigFlow's angles at which the paper's steps begin; the first input is pure noise nevertheless."""


class RCM(Distiller):
    """A student of any number of steps, a loss weight that is learnt for every time, and a fake score."""

    turn_names = ("student", "fake")
    optim_defaults: ClassVar = {
        "student": {"lr": 2e-6, "betas": (0.0, 0.999), "weight_decay": 0.01},
        "fake": {"lr": 4e-7, "betas": (0.0, 0.999), "weight_decay": 0.01},
    }
    sampling_options = frozenset({"steps", "grid", "mid_sigma"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(ConsistencyOptions):
        """Options of rCM."""

        steps: PositiveInt = 4
        """Sampling steps; one training serves all numbers."""
        grid: Literal["even", "paper"] = "even"
        """Where sampling steps begin: even on the schedule, or up to 4 at the paper's angles, all near noise."""
        sigma_data: PositiveFloat = 1.0
        """The data's standard deviation; schedules that define one of their own keep it."""
        log_sigma_mean: FiniteFloat = 0.7
        """Mean of the log noise level of the consistency loss."""
        log_sigma_std: PositiveFloat = 1.6
        """Its standard deviation."""
        warmup: NonNegativeInt = 0
        """Training steps until the tangent has its full weight; so long, the consistency loss is the only one."""
        consistency_weight: NonNegativeFloat = 0.1
        """Weight of the consistency loss."""
        matching_weight: NonNegativeFloat = 1.0
        """Weight of distribution matching."""
        most_steps: PositiveInt = 4
        """The random schedules of matching have 1 to this many steps."""
        matching_shift: PositiveFloat = 5.0
        """How far the uniform times at which scores are compared are moved towards noise; 1 is not at all."""
        student_update_interval: PositiveInt = 5
        """The student is updated on every n-th step, and the fake score on the others; 10 for 14 billion weights."""

        def __post_init__(self) -> None:
            if self.student_update_interval == 1:
                raise ValueError("student_update_interval: expected at least 2, or the fake score has no step, got 1")
            if self.grid == "paper" and self.steps > len(ANGLES):
                raise ValueError(f"steps: expected at most {len(ANGLES)} with grid 'paper', got {self.steps}")
            if self.grid == "paper" and self.mid_sigma is not None:
                raise ValueError(f"mid_sigma: expected none with grid 'paper', got {self.mid_sigma}")
            if not self.consistency_weight and not self.matching_weight:
                raise ValueError("matching_weight: expected above 0 where consistency_weight is 0, got 0")
            super().__post_init__()
            # sigma_data is the paper's grid's, too
            consistency = ["log_sigma_mean", "log_sigma_std", "tangent", "difference", "warmup", "norm_floor"]
            refuse_unread(self, consistency, not self.consistency_weight, "without consistency_weight")
            matching = ["most_steps", "matching_shift"]
            refuse_unread(self, matching, not self.matching_weight, "without matching_weight")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        if config.grid == "even":
            return angle_sampler(config.steps, family.schedule, config.mid_sigma)
        times = angle_grid(family.schedule, ANGLES[: config.steps], config.sigma_data)
        if isinstance(family.schedule, Karras) or not (times.diff() < 0).all():
            raise ValueError("method.grid: expected 'even' for a teacher that is not told these angles, got 'paper'")
        return ConsistencySampler(family.schedule, times)

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        check_first_step(family)  # of matching, whatever the grid
        if config.consistency_weight:
            check_derivative(config, family)

    def build(self) -> None:
        self.fake = self.add_role("fake")
        self.time_weight = TimeWeight()
        self.consistency = SelfConsistency(self.teacher, self.student, self.config, self.time_weight)
        self.matching = Matching(self.teacher, self.fake, self.config.guidance_scale)
        self.add_turn("student", self.student_loss, self.time_weight, when=self.updates_student)
        self.add_turn("fake", self.fake_loss, when=self.updates_fake)

    def updates_student(self, step: int) -> bool:
        """Return True on every step of the warm-up, and on the last of every interval after it."""
        return step < self.config.warmup or last_of(self.config.student_update_interval, self.config.warmup)(step)

    def updates_fake(self, step: int) -> bool:
        """Return True on all steps but the student's, and on the warm-up's: the fake score then knows the student."""
        return step < self.config.warmup or not self.updates_student(step)

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        config = self.config
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if config.consistency_weight:
            consistency = self.consistency(batch.x0, batch.cond, draws, self.step_in_stage)
            terms["consistency"] = config.consistency_weight * consistency.loss
            metrics |= consistency.metrics
        if config.matching_weight and self.step_in_stage >= config.warmup:
            x0 = self.generate(batch, draws)
            loss, scores = self.matching.guided(x0, batch.cond, draws, self.level(draws))
            terms["matching"] = config.matching_weight * loss
            metrics |= scores | {"diversity_ratio": diversity_ratio(x0, batch.x0)}
        return Losses(terms, metrics)

    def fake_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0 = self.generate(batch, draws)
        return Losses({"denoising": fake_score_loss(self.fake, x0, batch.cond, draws)})

    def generate(self, batch: Batch, draws: Draws) -> Tensor:
        """Return the student's clean images (B, ...) after a random number of steps from noise, at random times."""
        start = self.schedule.initial_noise(draws.normal_like(batch.x0))
        grid = levels.random_grid(self.schedule, draws, 1, self.config.most_steps)
        sampler = ConsistencySampler(self.schedule, grid)
        return simulation(self.student, sampler, start, batch.cond, draws)[-1].prediction.x0

    def level(self, draws: Draws) -> Tensor:
        """Return the times (B,) at which the scores are compared."""
        return shifted(levels.sample_times(self.schedule, draws, *levels.MATCHED), self.config.matching_shift)
