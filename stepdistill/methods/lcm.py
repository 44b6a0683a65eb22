r"""Latent consistency models (Luo et al. 2023, arXiv 2310.04378), and LCM-LoRA (2311.05556) under the adapter bank.

Consistency distillation that skips: the pair ``(x_t, x_s)`` lies k = 20 timesteps apart, on a grid of 50, so that the
end is reached in 50 hops and not in 1000. The step between them is a DDIM step of the *guided* teacher,

.. math:: \hat x_0 = (1 + w)\, x_0^{cond} - w\, x_0^{null}, \qquad \hat\epsilon \text{ likewise},

which bakes guidance into the student at one call per step: a fixed one, or, where the student takes w as an input, any
in a range. On the last interval ``s`` is clean data and the target is the step's own end: the boundary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import solver_step
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family, Inputs
from stepdistill.losses.consistency import check_intervals, consistency, consistency_sampler, shared_dropout, time_grid
from stepdistill.losses.regression import Distance, distance
from stepdistill.methods.base import Distiller, Losses, Turn
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws


class LCM(Distiller):
    """A student, its slow target, and one guided DDIM step between them."""

    sampling_options: ClassVar = frozenset({"steps"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of latent consistency distillation."""

        steps: int = 4
        """Network calls of a sample."""
        solver_steps: int = 50
        """DDIM steps of the teacher from noise to data: the grid the student lives on."""
        guidance_scale: float = 1.0
        """Guidance baked into the student, or its default where it takes the scale as an input; 1 is none."""
        guidance_range: tuple[float, ...] = ()
        """Lowest and highest scale, for a student that takes it as an input; by default the scale is fixed."""
        distance: Distance = "huber"
        target_ema: float = 0.95
        """Decay of the target's average; 0 is the student itself, as LCM-LoRA has it."""

        def __post_init__(self) -> None:
            if not 0 <= self.target_ema < 1:
                raise ValueError(f"target_ema: found {self.target_ema}, wanted 0 <= target_ema < 1")
            if not self.guidance_range:
                return
            if len(self.guidance_range) != 2 or not 1 <= self.guidance_range[0] < self.guidance_range[1]:
                raise ValueError(
                    f"guidance_range: found {self.guidance_range}, wanted [low, high] with 1 <= low < high"
                )
            if not self.guidance_range[0] <= self.guidance_scale <= self.guidance_range[1]:
                raise ValueError(f"guidance_scale: found {self.guidance_scale}, outside {self.guidance_range}")

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        for scale in (config.guidance_scale, *config.guidance_range):
            family.check_guidance(scale)
        check_intervals(family.schedule, config.steps, config.solver_steps, "solver_steps")
        to_diffusers(consistency_sampler(family.schedule, config.steps, config.solver_steps), family.scheduler_config)

    @classmethod
    def extra_inputs(cls, config: Any) -> Inputs:
        return Inputs(w=tuple(scale - 1 for scale in config.guidance_range) or None)

    def build(self) -> Sequence[Turn]:
        if self.config.guidance_range:
            self.student = Denoiser(self.family, self.bank, "student", w=self.config.guidance_scale - 1)
        self.bank.fork("target", "student", trainable=False)
        self.target = Denoiser(self.family, self.bank, "target")
        return [Turn("student", self.bank.params("student"), self.loss)]

    def sampler(self) -> Sampler:
        return consistency_sampler(self.schedule, self.config.steps, self.config.solver_steps)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        grid = time_grid(self.schedule, self.config.solver_steps).to(batch.x0.device)
        i = draws.integers(0, self.config.solver_steps)
        t, s = grid[i], grid[i + 1]
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        w = draws.uniform(*(scale - 1 for scale in self.config.guidance_range)) if self.config.guidance_range else None
        with torch.no_grad():
            weight = self.config.guidance_scale - 1 if w is None else w
            teacher = self.teacher.guided(batch.cond, weight)
            x_s = solver_step(teacher, x_t, t, s, self.schedule)
            with shared_dropout(self.bank, "target", x_s):
                target = consistency(self.target, x_s, s, batch.cond, w)
        error = distance(consistency(self.student, x_t, t, batch.cond, w), target, self.config.distance)
        return Losses({"loss": error.mean()})

    def after_step(self) -> None:
        self.bank.blend("target", "student", self.config.target_ema)

    def contract(self) -> dict[str, Any]:
        return {"guidance_range": list(self.config.guidance_range)}
