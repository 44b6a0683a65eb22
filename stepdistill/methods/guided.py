r"""Distillation of guided diffusion models (Meng et al. 2022, arXiv 2210.03142).

Stage one: a student that takes the guidance weight w as an input learns, in one call, what the guided teacher sees in
two,

.. math:: \hat x^w = (1 + w)\, \hat x(x_t, c) - w\, \hat x(x_t, \varnothing), \qquad w \sim U[w_{min}, w_{max}].

It starts as the conditional teacher for every w, because the branch of w starts at zero. Stage two is progressive
distillation with w carried along: drawn afresh for every sample, the same in the mentor's two steps and in the
student's.
Both stages see the times of the finest grid, which are all the times that any student is ever asked about.

The stochastic sampler (:class:`~stepdistill.diffusion.samplers.DoubleStep`) jumps two points of the student's grid down
and noises one back up. Its student is trained, in one more stage, for exactly these jumps from every point of the grid,
and for the last edge, a single step to clean data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Denoise, Prediction
from stepdistill.diffusion.samplers import DDIM, DoubleStep, Sampler
from stepdistill.diffusion.schedule import NoiseSchedule, expand
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family, Inputs
from stepdistill.losses.progressive import halvings, nested_grid, two_step_target
from stepdistill.losses.regression import Weighting, mean_square, weighted, x0_weight
from stepdistill.methods.base import Distiller, Losses, Stage, Turn, share_out
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

MATCH, STOCHASTIC = "match", "stochastic"


def make_sampler(schedule: NoiseSchedule, start: int, steps: int, kind: str) -> Sampler:
    """The sampler of a student of ``steps`` calls, at times out of the first mentor's."""
    return (DoubleStep if kind == STOCHASTIC else DDIM)(schedule, nested_grid(schedule, start, steps))


class Guided(Distiller):
    """A student that takes w, and its mentor: one stage for guidance, then a stage a halving."""

    # the rate must reach zero in every stage, or its error is what the next one learns
    optim_defaults: ClassVar = {"student": {"lr": 2e-4, "schedule": "linear"}}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of guided distillation; scales are diffusers', 1 is no guidance (papers' w is the scale less one)."""

        steps: int = 4
        """Network calls of the finished student."""
        start: int = 32
        """DDIM steps of the student that has learnt guidance: ``steps`` times a power of two."""
        guidance_min: float = 1.0
        """Lowest guidance scale the student can be asked for."""
        guidance_max: float = 5.0
        """Highest guidance scale the student can be asked for."""
        guidance_scale: float = 2.0
        """Guidance of a bare call, and of the samples and metrics made while training."""
        sampler: Literal["deterministic", "stochastic"] = "deterministic"
        """DDIM; or two steps forth and one back in noise, at as many calls and with one more stage."""
        weighting: Weighting = "truncated_snr"
        """What an error of the clean image counts for."""
        first_stage: float = 2.0
        """How much longer the stage that learns guidance is than a halving."""
        last_stages: float = 2.0
        """How much longer the stages to two and to one step are than the others."""

        def __post_init__(self) -> None:
            halvings(self.start, self.steps)
            if not self.guidance_min <= self.guidance_scale <= self.guidance_max:
                raise ValueError(
                    "wanted guidance_min <= guidance_scale <= guidance_max; found "
                    f"{self.guidance_min}, {self.guidance_scale}, {self.guidance_max}"
                )
            if self.sampler == STOCHASTIC and self.steps < 2:
                raise ValueError(f"steps: found {self.steps}; the stochastic sampler wants at least 2")

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        family.null_cond(family.example_cond([0]))
        to_diffusers(make_sampler(family.schedule, config.start, config.steps, config.sampler), family.scheduler_config)

    @classmethod
    def extra_inputs(cls, config: Any) -> Inputs:
        return Inputs(w=(config.guidance_min - 1, config.guidance_max - 1))

    def build(self) -> Sequence[Turn]:
        if self.family.prediction_type == "epsilon":  # does not survive to one step, see progressive.py
            self.family = self.family.with_prediction("v_prediction")
        self.student = Denoiser(self.family, self.bank, "student", w=self.config.guidance_scale - 1)
        self.bank.fork("mentor", trainable=False)
        self.mentor = Denoiser(self.family, self.bank, "mentor")
        return [Turn("student", self.bank.params("student"), self.loss)]

    def stages(self, steps: int) -> list[Stage]:
        shares = {MATCH: (self.config.start, self.config.first_stage)}
        for n in halvings(self.config.start, self.config.steps):
            shares[f"{n}-steps"] = (n, self.config.last_stages if n <= 2 else 1.0)
        if self.config.sampler == STOCHASTIC:
            shares[STOCHASTIC] = (self.config.steps, self.config.last_stages)
        return share_out(steps, shares)

    def begin_stage(self) -> None:
        self.bank.blend("student", self.result_role, keep=0)
        self.bank.blend("mentor", self.result_role, keep=0)

    def sampler(self) -> Sampler:
        return make_sampler(self.schedule, self.config.start, self.stage.value, self.stage.name)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        w = draws.uniform(self.config.guidance_min - 1, self.config.guidance_max - 1)
        t, t_mid, s = (time.to(batch.x0.device) for time in self.jump(draws))
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        with torch.no_grad():
            if self.stage.name == MATCH:
                target = self.teacher.guided(batch.cond, w)(x_t, t).x0
            else:
                target = two_step_target(self.stage_teacher(batch.cond, w), x_t, t, t_mid, s, self.schedule)
        error = mean_square(self.student(x_t, t, batch.cond, w=w).x0, target)
        return Losses({"loss": weighted(x0_weight(self.schedule.log_snr(t), self.config.weighting), error)})

    def jump(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """From where, by way of what, to where (B,) the mentor steps: neighbours on the mentor's grid.

        A deterministic student starts from every other point; a stochastic one from all, the last edge being a step of
        the mentor and a step that stays at clean data.
        """
        points = self.stage.value if self.stage.name in (MATCH, STOCHASTIC) else 2 * self.stage.value
        stride = points // self.stage.value
        grid = nested_grid(self.schedule, self.config.start, points)
        i = stride * draws.integers(0, self.stage.value).cpu()
        return grid[i], grid[i + 1], grid[(i + 2).clamp(max=points)]

    def stage_teacher(self, cond: Cond, w: Tensor) -> Denoise:
        """The mentor under w; in clean data it sees the image itself and no noise."""

        def see(x_t: Tensor, t: Tensor) -> Prediction:
            seen, clean = self.mentor(x_t, t, cond, w=w), expand(t == 0, x_t) > 0
            return Prediction(torch.where(clean, x_t, seen.x0), torch.where(clean, 0, seen.eps))

        return see

    def contract(self) -> dict[str, Any]:
        return {"guidance_range": [self.config.guidance_min, self.config.guidance_max]}
