r"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512).

A student of N steps learns to do in one DDIM step what its teacher does in two. Then it becomes the teacher, and N is
halved. For times t > t' > t'' on the teacher's grid, two steps of the teacher lead from ``x_t`` to ``x_{t''}``, and

.. math:: \tilde x = \frac{x_{t''} - (\sigma_{t''} / \sigma_t) x_t}{\alpha_{t''} - (\sigma_{t''} / \sigma_t) \alpha_t}

is the clean image whose single DDIM step from ``x_t`` ends there (Eq. 8): the student's target. The same formula gives
the mean velocity for flows and the Euler target for EDM.

A student that predicts noise cannot reach one step: its clean image at pure noise is the prediction's error divided by
an alpha near zero (Section 4). A student of a noise-predicting teacher therefore predicts the velocity, if it has one
step or its schedule leaves no signal in pure noise. In a first stage it learns the teacher's own velocities on the
finest grid.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Denoise
from stepdistill.diffusion.samplers import DDIM, Sampler
from stepdistill.families.base import Family
from stepdistill.files.ranges import GuidanceScale, PositiveFloat, PositiveInt
from stepdistill.losses.progressive import CONVERT, halvings, needs_velocity, stage_grid, two_step_target
from stepdistill.losses.regression import Weighting, mean_square, weighted, x0_weight
from stepdistill.methods.base import Distiller, Losses, Stage, split_steps
from stepdistill.randomness import Draws


class Progressive(Distiller):
    """One student, the student of the last stage as its teacher, and a stage per halving."""

    # the learning rate must reach zero in every stage, because the next stage learns this one's errors too
    optim_defaults: ClassVar = {"student": {"lr": 2e-4, "schedule": "linear"}}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of progressive distillation."""

        steps: PositiveInt = 4
        """Sampling steps of the finished student."""
        start: PositiveInt = 32
        """DDIM steps of the first teacher: ``steps`` times a power of two."""
        weighting: Weighting = "truncated_snr"
        """Weight of an error of the clean image."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance baked into the student; 1 is none."""
        last_stages: PositiveFloat = 2.0
        """Length of the stages to two and to one step, relative to the others."""

        def __post_init__(self) -> None:
            halvings(self.start, self.steps)

    @classmethod
    def needs_velocity(cls, config: Config, family: Family) -> bool:
        return needs_velocity(family, config.steps)

    @classmethod
    def make_sampler(cls, config: Config, family: Family, steps: int | None = None) -> Sampler:
        return DDIM(family.schedule, stage_grid(family.schedule, config.start, steps or config.steps))

    def stage_sampler(self) -> Sampler:
        return self.make_sampler(self.config, self.family, self.stage.value)

    def build(self) -> None:
        self.last_student = self.add_role("mentor", trainable=False)
        self.add_turn("student", self.loss)

    def stages(self, steps: int) -> list[Stage]:
        shares = {CONVERT: (self.config.start, 1.0)} if self.converts else {}
        for n in halvings(self.config.start, self.config.steps):
            shares[f"{n}-steps"] = (n, self.config.last_stages if n <= 2 else 1.0)
        return split_steps(steps, shares)

    def begin_stage(self) -> None:
        self.bank.blend("student", self.result_role, keep=0)
        self.bank.blend("mentor", self.result_role, keep=0)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        grid = self.times(self.schedule.grid, self.config.start, draws.device)
        stride = self.config.start // self.stage.value
        i = stride * draws.integers(0, self.stage.value)
        t, t_mid, s = grid[i], grid[i + stride // 2], grid[i + stride]
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        with torch.no_grad():
            if self.stage.name == CONVERT:
                target = self.guided_teacher(batch.cond)(x_t, t).x0
            else:
                target = two_step_target(self.stage_teacher(batch.cond), x_t, t, t_mid, s, self.schedule)
        error = mean_square(self.student(x_t, t, batch.cond).x0, target)
        return Losses({"loss": weighted(x0_weight(self.schedule.log_snr(t), self.config.weighting), error)})

    def stage_teacher(self, cond: Cond) -> Denoise:
        """Return the teacher of this stage: in the first halving the (guided) teacher, later the last student."""
        if self.stage.value == self.config.start // 2 and not self.converts:
            return self.guided_teacher(cond)
        return self.last_student.conditioned(cond)
