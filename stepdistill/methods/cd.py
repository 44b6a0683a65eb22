r"""Consistency distillation (Song et al. 2023, arXiv 2303.01469, Algorithm 2).

The time axis is cut into N intervals. One solver step of the teacher across an interval leads from ``x_t`` to ``x_s``,
and the student learns to name the same end of the trajectory from both,

.. math:: \| f_\theta(x_t, t) - f_{\theta^-}(\hat x_s, s) \|^2,

the second through a target whose weights are an average of the student's. At the optimum the student is the teacher's
own N-step solver, run in one call: N bounds its quality, and the number of hops that knowledge has to travel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import Solver, solver_step
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family
from stepdistill.losses.consistency import check_intervals, consistency, consistency_sampler, shared_dropout, time_grid
from stepdistill.losses.perceptual import ConsistencyDistance, check_resemblance, open_distance
from stepdistill.methods.base import Distiller, Losses, Turn
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws


class CD(Distiller):
    """A student, its slow target, and one teacher step between them."""

    sampling_options: ClassVar = frozenset({"steps"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of consistency distillation."""

        steps: int = 2
        """Network calls of a sample; must divide ``intervals``."""
        intervals: int = 40
        """Into how many intervals the time axis is cut (N - 1 in the paper)."""
        solver: Solver = "heun"
        """The teacher's step across an interval: one network call, or two."""
        guidance_scale: float = 1.0
        """Guidance of the teacher, baked into the student; 1 is none."""
        distance: ConsistencyDistance = "l2"
        """``lpips`` is the paper's choice for pictures; it is an extra."""
        target_ema: float = 0.95
        """Decay of the target's average; 0 is the student itself."""

        def __post_init__(self) -> None:
            if not 0 <= self.target_ema < 1:
                raise ValueError(f"target_ema: found {self.target_ema}, wanted 0 <= target_ema < 1")

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        check_resemblance(config.distance)
        family.check_guidance(config.guidance_scale)
        check_intervals(family.schedule, config.steps, config.intervals, "intervals")
        if config.intervals % config.steps:
            raise ValueError(f"method.intervals: found {config.intervals}, wanted a multiple of steps = {config.steps}")
        to_diffusers(consistency_sampler(family.schedule, config.steps, config.intervals), family.scheduler_config)

    def build(self) -> Sequence[Turn]:
        self.bank.fork("target", "student", trainable=False)
        self.target = Denoiser(self.family, self.bank, "target")
        self.distance = open_distance(self.config.distance, self.teacher)
        return [Turn("student", self.bank.params("student"), self.loss)]

    def sampler(self) -> Sampler:
        return consistency_sampler(self.schedule, self.config.steps, self.config.intervals)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        grid = time_grid(self.schedule, self.config.intervals).to(batch.x0.device)
        i = draws.integers(0, self.config.intervals)
        t, s = grid[i], grid[i + 1]
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        with torch.no_grad():
            teacher = self.teacher.guided(batch.cond, self.config.guidance_scale - 1)
            x_s = solver_step(teacher, x_t, t, s, self.schedule, self.config.solver)
            with shared_dropout(self.bank, "target", x_s):
                target = consistency(self.target, x_s, s, batch.cond)
        error = self.distance(consistency(self.student, x_t, t, batch.cond), target, batch.cond)
        return Losses({"loss": error.mean()})

    def after_step(self) -> None:
        self.bank.blend("target", "student", self.config.target_ema)
