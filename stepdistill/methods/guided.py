r"""Distillation of guided diffusion models (Meng et al. 2022, arXiv 2210.03142).

Stage one: a student that takes the guidance weight w as an input learns to predict, in one call, what the guided
teacher predicts in two,

.. math:: \hat x^w = (1 + w)\, \hat x(x_t, c) - w\, \hat x(x_t, \varnothing), \qquad w \sim U[w_{min}, w_{max}].

The student starts as the conditional teacher for every w, because the branch of w is initialised with zeros. Stage two
is progressive distillation (:mod:`stepdistill.methods.progressive`) with w as an input: w is drawn for every sample,
and is the same in the teacher's two steps and in the student's one. Both stages use the times of the finest grid.

The stochastic sampler (:class:`~stepdistill.diffusion.samplers.DoubleStep`) jumps two points of the student's grid down
and returns by one with fresh noise. One more stage trains its student for exactly these jumps, from every point of the
grid, and for the last interval, which is a single step to clean data.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Denoise, Prediction
from stepdistill.diffusion.samplers import DDIM, DoubleStep, Sampler
from stepdistill.diffusion.schedule import expand
from stepdistill.families.base import Family, Inputs
from stepdistill.files.ranges import GuidanceScale, PositiveFloat, PositiveInt
from stepdistill.losses.guidance_input import guidance_followed
from stepdistill.losses.progressive import halvings, needs_velocity, stage_grid, two_step_target
from stepdistill.losses.regression import Weighting, mean_square, weighted, x0_weight
from stepdistill.methods.base import Distiller, Losses, Stage, split_steps
from stepdistill.randomness import Draws

MATCH, STOCHASTIC = "match", "stochastic"


class Guided(Distiller):
    """A student that takes w as an input: one stage for guidance, then a stage per halving."""

    # the learning rate must reach zero in every stage, because the next stage learns this one's errors too
    optim_defaults: ClassVar = {"student": {"lr": 2e-4, "schedule": "linear"}}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of guided distillation; a scale is 1 + w as in diffusers, and 1 is no guidance."""

        steps: PositiveInt = 4
        """Sampling steps of the finished student."""
        start: PositiveInt = 32
        """DDIM steps of the student that has learnt guidance: ``steps`` times a power of two."""
        guidance_min: GuidanceScale = 1.0
        """Lowest guidance scale of the student."""
        guidance_max: GuidanceScale = 5.0
        """Highest guidance scale of the student."""
        guidance_scale: GuidanceScale = 2.0
        """The default scale, also of the samples and metrics during training."""
        sampler: Literal["deterministic", "stochastic"] = "deterministic"
        """DDIM, or two steps down and one up with noise; the latter needs one more stage and as many calls."""
        weighting: Weighting = "truncated_snr"
        """Weight of an error of the clean image."""
        first_stage: PositiveFloat = 2.0
        """Length of the stage that learns guidance, relative to a halving."""
        last_stages: PositiveFloat = 2.0
        """Length of the stages to two and to one step, relative to the others."""

        def __post_init__(self) -> None:
            halvings(self.start, self.steps)
            if not self.guidance_min <= self.guidance_scale <= self.guidance_max:
                raise ValueError(
                    f"guidance_scale: expected guidance_min = {self.guidance_min} to guidance_max = "
                    f"{self.guidance_max}, got {self.guidance_scale}"
                )
            if self.sampler == STOCHASTIC and self.steps < 2:
                raise ValueError(f"steps: expected at least 2 with the stochastic sampler, got {self.steps}")

    @classmethod
    def needs_velocity(cls, config: Config, family: Family) -> bool:
        return needs_velocity(family, config.steps)

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        rule = DoubleStep if config.sampler == STOCHASTIC else DDIM
        return rule(family.schedule, stage_grid(family.schedule, config.start, config.steps))

    def stage_sampler(self) -> Sampler:
        rule = DoubleStep if self.stage.name == STOCHASTIC else DDIM
        return rule(self.schedule, stage_grid(self.schedule, self.config.start, self.stage.value))

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        family.null_cond(family.example_cond([0]))

    @classmethod
    def extra_inputs(cls, config: Config) -> Inputs:
        return Inputs(w=(config.guidance_min - 1, config.guidance_max - 1))

    def build(self) -> None:
        self.student.w = self.config.guidance_scale - 1
        self.last_student = self.add_role("mentor", trainable=False)
        self.add_turn("student", self.loss)

    def stages(self, steps: int) -> list[Stage]:
        shares = {MATCH: (self.config.start, self.config.first_stage)}
        for n in halvings(self.config.start, self.config.steps):
            shares[f"{n}-steps"] = (n, self.config.last_stages if n <= 2 else 1.0)
        if self.config.sampler == STOCHASTIC:
            shares[STOCHASTIC] = (self.config.steps, self.config.last_stages)
        return split_steps(steps, shares)

    def begin_stage(self) -> None:
        self.bank.blend("student", self.result_role, keep=0)
        self.bank.blend("mentor", self.result_role, keep=0)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        w = draws.uniform(self.config.guidance_min - 1, self.config.guidance_max - 1)
        t, t_mid, s = self.draw_times(draws)
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        if self.stage.name == MATCH:
            return self.match(batch.cond, x_t, t, w)
        with torch.no_grad():
            target = two_step_target(self.stage_teacher(batch.cond, w), x_t, t, t_mid, s, self.schedule)
        return Losses({"loss": self.error(self.student(x_t, t, batch.cond, w=w).x0, target, t)})

    def match(self, cond: Cond, x_t: Tensor, t: Tensor, w: Tensor) -> Losses:
        """Return the error of the stage that learns guidance."""
        with torch.no_grad():
            guided, conditional = self.teacher.guided_and_conditional(x_t, t, cond, w)
        found = self.student(x_t, t, cond, w=w).x0
        followed = guidance_followed(found, guided.x0, conditional.x0, w)
        return Losses({"loss": self.error(found, guided.x0, t)}, {"guidance_followed": followed})

    def error(self, found: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Return the weighted squared error of clean images (B, ...) at times (B,)."""
        return weighted(x0_weight(self.schedule.log_snr(t), self.config.weighting), mean_square(found, target))

    def draw_times(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Return start, middle and end (B,) of two steps of the teacher on its grid.

        A deterministic student starts at every other point. A stochastic one starts at all points, and from the last
        one the teacher's second step stays at clean data.
        """
        points = self.stage.value if self.stage.name in (MATCH, STOCHASTIC) else 2 * self.stage.value
        grid = self.times(self.schedule.grid, self.config.start, draws.device)[:: self.config.start // points]
        i = points // self.stage.value * draws.integers(0, self.stage.value)
        return grid[i], grid[i + 1], grid[(i + 2).clamp(max=points)]

    def stage_teacher(self, cond: Cond, w: Tensor) -> Denoise:
        """Return the last student under w; at clean data it predicts the image itself and no noise."""

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            prediction, clean = self.last_student(x_t, t, cond, w=w), expand(t == 0, x_t) > 0
            return Prediction(torch.where(clean, x_t, prediction.x0), torch.where(clean, 0, prediction.eps))

        return denoise

    def contract(self) -> dict[str, object]:
        return {"guidance_range": [self.config.guidance_min, self.config.guidance_max]}
