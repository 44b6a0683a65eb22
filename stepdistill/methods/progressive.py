r"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512).

A student of N steps learns to do in one DDIM step what its mentor does in two; then it becomes the mentor, and N is
halved. With times t > t' > t'' a student step apart, the mentor's two steps lead from ``x_t`` to ``x_{t''}``, and

.. math:: \tilde x = \frac{x_{t''} - (\sigma_{t''} / \sigma_t) x_t}{\alpha_{t''} - (\sigma_{t''} / \sigma_t) \alpha_t}

is the clean image whose single DDIM step from ``x_t`` lands there (Eq. 8): the student's target. The same formula is
the mean velocity for flows and the Euler target for EDM.

Noise prediction does not survive to one step: at pure noise, the clean image is the noise prediction's error divided by
an alpha near zero (Section 4). A student of an epsilon-teacher is therefore given a velocity output, in a first stage
that regresses the teacher's own velocities on the finest grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Denoise, Prediction
from stepdistill.diffusion.samplers import DDIM, Sampler
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family
from stepdistill.losses.progressive import halvings, nested_grid, two_step_target
from stepdistill.losses.regression import Weighting, mean_square, weighted, x0_weight
from stepdistill.methods.base import Distiller, Losses, Stage, Turn, share_out
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

CONVERT = "convert"


class Progressive(Distiller):
    """One student, one mentor, a stage a halving."""

    # the rate must reach zero in every stage, or its error is what the next one learns
    optim_defaults: ClassVar = {"student": {"lr": 2e-4, "schedule": "linear"}}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of progressive distillation."""

        steps: int = 4
        """Network calls of the finished student."""
        start: int = 32
        """DDIM steps of the teacher that is the first mentor: ``steps`` times a power of two."""
        weighting: Weighting = "truncated_snr"
        """What an error of the clean image counts for."""
        guidance_scale: float = 1.0
        """Guidance baked into the student; 1 is none."""
        last_stages: float = 2.0
        """How much longer the stages to two and to one step are than the others."""

        def __post_init__(self) -> None:
            halvings(self.start, self.steps)

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        if config.guidance_scale != 1:
            family.null_cond(family.example_cond([0]))
        grid = nested_grid(family.schedule, config.start, config.steps)
        to_diffusers(DDIM(family.schedule, grid), family.scheduler_config)

    def build(self) -> Sequence[Turn]:
        self.converts = self.family.prediction_type == "epsilon"
        if self.converts:
            self.family = self.family.with_prediction("v_prediction")
            self.student = Denoiser(self.family, self.bank, "student")
        self.bank.fork("mentor", trainable=False)
        self.mentor = Denoiser(self.family, self.bank, "mentor")
        return [Turn("student", self.bank.params("student"), self.loss)]

    def stages(self, steps: int) -> list[Stage]:
        sizes = halvings(self.config.start, self.config.steps)
        shares = {f"{n}-steps": (n, self.config.last_stages if n <= 2 else 1.0) for n in sizes}
        if self.converts:
            shares = {CONVERT: (self.config.start, 1.0)} | shares
        return share_out(steps, shares)

    def begin_stage(self) -> None:
        self.bank.blend("student", self.result_role, keep=0)
        self.bank.blend("mentor", self.result_role, keep=0)

    def sampler(self) -> Sampler:
        return DDIM(self.schedule, nested_grid(self.schedule, self.config.start, self.stage.value))

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        start, steps = self.config.start, self.stage.value
        grid = nested_grid(self.schedule, start, steps).to(batch.x0.device)
        i = draws.integers(0, steps)
        t, s = grid[i], grid[i + 1]
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        with torch.no_grad():
            if self.stage.name == CONVERT:
                target = self.guided_teacher(x_t, t, batch.cond).x0
            else:
                t_mid = nested_grid(self.schedule, start, 2 * steps).to(t.device)[2 * i + 1]
                target = two_step_target(self.stage_teacher(batch.cond), x_t, t, t_mid, s, self.schedule)
        error = mean_square(self.student(x_t, t, batch.cond).x0, target)
        return Losses({"loss": weighted(x0_weight(self.schedule.log_snr(t), self.config.weighting), error)})

    def stage_teacher(self, cond: Cond) -> Denoise:
        """The mentor of this stage: the (guided) teacher on the first halving, then the last student."""
        first = not self.converts and self.stage.value == self.config.start // 2
        return (lambda x_t, t: self.guided_teacher(x_t, t, cond)) if first else self.mentor.conditioned(cond)

    def guided_teacher(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """The teacher under the guidance that is baked in."""
        if self.config.guidance_scale == 1:
            return self.teacher(x_t, t, cond)
        return self.teacher.guided(cond, self.config.guidance_scale - 1)(x_t, t)
