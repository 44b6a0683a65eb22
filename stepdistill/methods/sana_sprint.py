r"""SANA-Sprint (Chen et al. 2025, arXiv 2503.09641): sCM with the critic of LADD.

The consistency loss (:mod:`stepdistill.methods.scm`) keeps the student on the teacher's paths, and a critic on the
teacher's features (:mod:`stepdistill.methods.ladd`) makes its images sharp,

.. math:: L = L_{sCM} + \lambda L_{adv}.

The critic judges the clean images of the same pass of the student, or, where single steps matter most, those of a
second pass, a share of whose inputs is pure noise ("max-time weighting", Section 3.3). Student and critic take turns.

**Re-timing.** A teacher that is told a thousand times its time makes the student's derivative a thousand times as
large, with waves between timesteps that no training has shown (Section 3.2). There are two ways out. A difference over
25 timesteps needs no change (``tangent: difference``). Or the student first learns to be told times on unit scale,
``retime`` being the share of training for that; then it is differentiated exactly, and its export tells it so. Only a
flow's timesteps can be rescaled. A flow network predicts TrigFlow's velocity by algebra alone, without training.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.discriminators.critics import RenoisedCritic
from stepdistill.discriminators.feature_sources import MAX_BLOCKS
from stepdistill.families.base import Family, Inputs
from stepdistill.files import ranges
from stepdistill.losses import guidance_input
from stepdistill.losses.adversarial import AdversarialLoss
from stepdistill.losses.levels import sample_times
from stepdistill.losses.regression import mean_square
from stepdistill.losses.self_consistency import (
    ConsistencyOptions,
    SelfConsistency,
    TimeWeight,
    angle_sampler,
    check_derivative,
)
from stepdistill.losses.student_inputs import diversity_ratio, student_input
from stepdistill.methods.base import Distiller, Losses, Stage, last_of, split_steps
from stepdistill.randomness import Draws

RETIME = "retime"


class SanaSprint(Distiller):
    """A student, a loss weight that is learnt for every time, and a critic on the teacher's features."""

    turn_names = ("student", "critic")
    optim_defaults: ClassVar = {"student": {"lr": 1e-6, "clip": 0.1}, "critic": {"betas": (0.0, 0.99)}}
    sampling_options = frozenset({"steps", "mid_sigma"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(ConsistencyOptions):
        """Options of SANA-Sprint."""

        log_sigma_mean: ranges.FiniteFloat = 0.2
        """Mean of the log noise level of the consistency loss."""
        log_sigma_std: ranges.PositiveFloat = 1.6
        """Its standard deviation."""
        warmup: ranges.NonNegativeInt = 4000
        """Training steps until the tangent has its full weight (r = 1)."""
        guidance_range: tuple[ranges.GuidanceScale, ...] = ()
        """Lowest and highest scale of a student that takes it as an input, whose default is ``guidance_scale``; by
        default the scale is fixed."""
        adversarial_weight: ranges.NonNegativeFloat = 0.5
        """Weight of the adversarial loss, relative to the consistency loss."""
        largest_share: ranges.Share = 0.5
        """Share of the judged images that are made of pure noise, in a second pass of the student; the others are made
        at fresh noise levels. At 0 there is no second pass, and the images of the consistency loss are judged."""
        adversarial: AdversarialLoss = "hinge"
        location: ranges.FiniteFloat = -0.6
        """Mean of the logit-normal noise levels at which the critic judges."""
        scale: ranges.PositiveFloat = 1.0
        """Their standard deviation."""
        max_blocks: ranges.PositiveInt = MAX_BLOCKS
        """Most blocks of the teacher that the critic has a head on, evenly spaced."""
        student_update_interval: ranges.PositiveInt = 2
        """The student is updated on every n-th step, and the critic on the others."""
        retime: ranges.Decay = 0.0
        """Share of training in which the student of a flow teacher learns to be told times on unit scale; 0: none."""

        def __post_init__(self) -> None:
            super().__post_init__()
            guidance_input.check_range(self.guidance_range, self.guidance_scale)
            if self.student_update_interval == 1:
                raise ValueError("student_update_interval: expected at least 2, or the critic has no step, got 1")

    @classmethod
    def student_family(cls, config: Config, family: Family) -> Family:
        return family.with_unit_times() if config.retime else family

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return angle_sampler(config.steps, family.schedule, config.mid_sigma)

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        family.check_guidance(max(config.guidance_range, default=1.0))
        cls.check_retimed(config, family)
        check_derivative(config, cls.student_family(config, family))

    @classmethod
    def check_retimed(cls, config: Config, family: Family) -> None:
        """Raise ``ValueError`` if the teacher's pipeline cannot sample a student that is told other times."""
        student = cls.student_family(config, family)
        try:
            student.check_sampler(cls.make_sampler(config, student))
        except ValueError as error:
            if not config.retime:
                raise
            raise ValueError(f"method.retime: expected 0, got {config.retime}: {error}") from error

    @classmethod
    def extra_inputs(cls, config: Config) -> Inputs:
        return Inputs(w=guidance_input.weights(config.guidance_range))

    def build(self) -> None:
        config = self.config
        self.student.w = config.guidance_scale - 1 if self.inputs.w else None
        self.time_weight = TimeWeight()
        self.consistency = SelfConsistency(self.teacher, self.student, config, self.time_weight)
        self.critic = RenoisedCritic(
            self.teacher, config.location, config.scale, loss=config.adversarial, max_blocks=config.max_blocks
        )
        self.conditional_critic = self.critic.conditional
        self.add_turn("student", self.student_loss, self.time_weight, when=self.updates_student)
        self.add_turn("critic", self.critic_loss, self.critic, when=lambda step: not self.updates_student(step))

    def stages(self, steps: int) -> list[Stage]:
        share = self.config.retime
        if not share:
            return super().stages(steps)
        return split_steps(steps, {RETIME: (self.config.steps, share), "train": (self.config.steps, 1 - share)})

    def begin_stage(self) -> None:
        self.bank.blend("student", self.result_role, keep=0)

    def updates_student(self, step: int) -> bool:
        """Return True on every step of re-timing, and on the last of every interval after it."""
        return self.stage.name == RETIME or last_of(self.config.student_update_interval)(step)

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        if self.stage.name == RETIME:
            return Losses({"retiming": self.retiming(batch, draws)})
        w = self.weights(draws)
        consistency = self.consistency(batch.x0, batch.cond, draws, self.step_in_stage, w)
        x0, t = consistency.student.x0, consistency.t
        if self.config.largest_share:
            x0, t = self.generate(batch, draws, w)
        adversarial = self.critic.student_loss(self.critic.see(x0), batch, t, draws)
        terms = {"consistency": consistency.loss, "adversarial": self.config.adversarial_weight * adversarial}
        return Losses(terms, consistency.metrics | {"diversity_ratio": diversity_ratio(x0, batch.x0)})

    def critic_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0, t = self.generate(batch, draws, self.weights(draws))
        return Losses(*self.critic.critic_loss(x0, batch, t, draws))

    def weights(self, draws: Draws) -> Tensor | None:
        """Return random guidance weights (B,) for a student that is told them."""
        return draws.uniform(*self.inputs.w) if self.inputs.w else None

    def generate(self, batch: Batch, draws: Draws, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the student's clean images (B, ...), and the times (B,) of its inputs, a share of them pure noise."""
        is_largest = draws.uniform() < self.config.largest_share
        t = torch.where(is_largest, 1.0, self.consistency.draw_point(draws, batch.x0).t)
        x_t = student_input(self.schedule, batch.x0, draws.normal_like(batch.x0), t)
        return self.student(x_t, t, batch.cond, w=w).x0, t

    def retiming(self, batch: Batch, draws: Draws) -> Tensor:
        """Return the squared error of the re-timed student's output, which is to be its teacher's."""
        t, w = sample_times(self.schedule, draws), self.weights(draws)
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        with torch.no_grad():
            target = self.teacher.raw(x_t, t, batch.cond)
        return mean_square(self.student.raw(x_t, t, batch.cond, w=w), target).mean()

    def contract(self) -> dict[str, object]:
        return {"guidance_range": list(self.config.guidance_range)}
