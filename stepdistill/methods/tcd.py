r"""Trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159).

A trajectory consistency function ``f(x_t, t -> s)`` names not only the end of a trajectory but every point of it on the
way. As an exponential integrator over the network's clean image,

.. math:: f(x_t, t \to s) = \frac{\sigma_s}{\sigma_t} x_t + \left(\alpha_s - \frac{\sigma_s}{\sigma_t} \alpha_t\right)
    \hat x_0,

of order one with ``x_0(x_t, t)``, which is the DDIM step, or of order two with ``x_0(x_u, u)`` at a point u half way
in log-SNR, itself reached by a step of order one. The boundary ``f(x, t -> t) = x`` holds by construction. As in LCM,
one DDIM step of the guided teacher leads from ``x_t`` to a next state, and both must arrive at the same ``x_s``, for
any s from there down. Errors stay small because a jump need no longer go all the way. A *two-time* student (the paper's
S+) is told s, and its clean image is then the mean over the jump instead of the one at its start.

Sampling is strategic stochastic (:class:`~stepdistill.diffusion.samplers.StrategicStochasticSampler`): jump
below the next time by the fraction gamma, then noise back up to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.ode import ode_step, solver_step
from stepdistill.diffusion.prediction import Denoise, Prediction
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.samplers import StrategicStochasticSampler as SSS
from stepdistill.diffusion.schedule import NoiseSchedule, expand
from stepdistill.families.base import Family, Inputs
from stepdistill.losses.consistency import check_intervals, shared_dropout, skip_grid, time_grid
from stepdistill.losses.regression import Distance, distance
from stepdistill.methods.base import Distiller, Losses, Turn
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

MIDPOINT_RANGE = 10.0
"""Log-SNRs are cut to +- this where a half-way point is sought: at clean data and at pure noise they are infinite."""


def midpoint(t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The times (B,) whose log-SNR lies in the middle between those of ``t`` and ``s``."""
    t_end, s_end = (schedule.log_snr(time).clamp(-MIDPOINT_RANGE, MIDPOINT_RANGE) for time in (t, s))
    return schedule.inverse((t_end + s_end) / 2).clamp(s, t)


def jump(denoise: Denoise, x_t: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule, order: Literal[1, 2]) -> Tensor:
    """``f(x_t, t -> s)`` for times ``s <= t``, both (B,); where they are equal, ``x_t`` itself."""
    prediction = denoise(x_t, t)
    if order == 2:
        u = midpoint(t, s, schedule)
        x0 = denoise(ode_step(prediction, schedule, u), u).x0
        alpha_t, sigma_t = (expand(coefficient, x_t) for coefficient in schedule(t))
        prediction = Prediction(x0, (x_t - alpha_t * x0) / sigma_t)
    return torch.where(expand(s == t, x_t) > 0, x_t, ode_step(prediction, schedule, s))


class TCD(Distiller):
    """A student that jumps anywhere along the teacher's trajectory, and its slow target."""

    sampling_options: ClassVar = frozenset({"steps", "gamma"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of trajectory consistency distillation."""

        steps: int = 4
        """Network calls of a sample."""
        solver_steps: int = 50
        """DDIM steps of the teacher from noise to data: the grid the student lives on."""
        order: Literal[1, 2] = 1
        """Of the exponential integrator in training; a sample takes one call a step in either case."""
        two_time: bool = False
        """Whether the network is told where it jumps to; stock diffusers then needs the export's own pipeline file."""
        guidance_scale: float = 1.0
        """Guidance baked into the student; 1 is none."""
        gamma: float = 0.2
        """Share of fresh noise when sampling: 0 none, 1 all, as LCM; more steps want more."""
        distance: Distance = "huber"
        target_ema: float = 0.95
        """Decay of the target's average; 0 is the student itself."""

        def __post_init__(self) -> None:
            if not 0 <= self.target_ema < 1:
                raise ValueError(f"target_ema: found {self.target_ema}, wanted 0 <= target_ema < 1")
            if not 0 <= self.gamma <= 1:
                raise ValueError(f"gamma: found {self.gamma}, wanted 0 to 1")
            if self.two_time and self.order != 1:
                raise ValueError(f"order: found {self.order}, wanted 1 with two_time, which replaces a second call")

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        family.check_guidance(config.guidance_scale)
        check_intervals(family.schedule, config.steps, config.solver_steps, "solver_steps")
        times = skip_grid(family.schedule, config.steps, config.solver_steps)
        family.check_sampler(SSS(family.schedule, times, config.gamma))

    @classmethod
    def extra_inputs(cls, config: Any) -> Inputs:
        return Inputs(s=config.two_time)

    def build(self) -> Sequence[Turn]:
        self.bank.fork("target", "student", trainable=False)
        self.target = Denoiser(self.family, self.bank, "target")
        return [Turn("student", self.bank.params("student"), self.loss)]

    def sampler(self) -> Sampler:
        times = skip_grid(self.schedule, self.config.steps, self.config.solver_steps)
        return SSS(self.schedule, times, self.config.gamma, two_time=self.config.two_time)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        steps = self.config.solver_steps
        grid = time_grid(self.schedule, steps).to(batch.x0.device)
        i = draws.integers(0, steps)
        j = i + 1 + (draws.uniform() * (steps - i)).long()  # anywhere below t, up to the end
        t, t_next, s = grid[i], grid[i + 1], grid[j]
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        with torch.no_grad():
            teacher = self.teacher.guided(batch.cond, self.config.guidance_scale - 1)
            x_next = solver_step(teacher, x_t, t, t_next, self.schedule)
            with shared_dropout(self.bank, "target", x_next):
                target = self.land(self.target, x_next, t_next, s, batch.cond)
        landed = self.land(self.student, x_t, t, s, batch.cond)
        return Losses({"loss": distance(landed, target, self.config.distance).mean()})

    def land(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """Where the trajectory consistency function of ``denoiser`` says that ``x_t`` is at ``s``."""
        told = s if self.config.two_time else None
        return jump(lambda x, time: denoiser(x, time, cond, s=told), x_t, t, s, self.schedule, self.config.order)

    def after_step(self) -> None:
        self.bank.blend("target", "student", self.config.target_ema)
