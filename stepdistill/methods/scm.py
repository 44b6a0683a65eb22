r"""sCM: continuous-time consistency models (Lu & Song 2024, arXiv 2410.11081), for teachers of any schedule.

A consistency model f maps every point of an ODE path to the path's end, so it must not change along the path. TrigFlow
parametrises the path by an angle theta, ``x = cos(theta) x_0 + sin(theta) z``, where z is noise with the standard
deviation sigma_d of the data. Its network F predicts the velocity ``sigma_d F = cos(theta) z - sin(theta) x_0``, and
``f = cos(theta) x - sin(theta) sigma_d F``. Algorithm 1 moves F against the tangent

.. math:: g = -\cos^2\theta (\sigma_d F - \dot x)
    - r (\cos\theta \sin\theta x + \sigma_d \dot F \cos\theta \sin\theta), \qquad r: 0 \to 1,

which at r = 1 is ``cos(theta) df/dtheta``. The direction ``dx/dtheta`` of the path comes from the teacher (sCD), or
from the data and noise that x is made of (sCT).

**Any teacher, without a change of architecture.** Schedules differ by a scale of the state, on which (x_0, eps) do not
depend. A network of any schedule is therefore a TrigFlow network with ``theta = atan(sigma / (alpha sigma_d))`` and
``z = sigma_d eps``, and all is computed in the teacher's own coordinates. The derivative by the angle, times cos sin,
is that by the log noise level ``nu = log(sigma / alpha)``. With the student's derivatives (x_0', eps') by nu,

.. math:: \cos\theta \sin\theta x + \sigma_d \dot F \cos\theta \sin\theta
    = \cos\theta \sigma_d \epsilon' - \sin\theta x_0'.

The finished student predicts x_0 and is sampled like every consistency model. On a native TrigFlow schedule, its
sampler is diffusers' ``SCMScheduler``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.ode import ode_step
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.samplers import ConsistencyKarras, ConsistencySampler, Sampler, rho_through
from stepdistill.diffusion.schedule import Karras, NoiseSchedule, expand
from stepdistill.diffusion.trig import Trig
from stepdistill.families.base import Family
from stepdistill.files.ranges import FiniteFloat, GuidanceScale, NonNegativeInt, PositiveFloat, PositiveInt
from stepdistill.methods.base import Distiller, Losses
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.modes import is_single_precision, single_precision
from stepdistill.randomness import Draws

MIDDLE_ANGLE = 1.1
"""TrigFlow's angle halfway down the sampling grid of EDM students: the second of two steps in the paper."""

LARGEST_UNIT_SPAN = 10.0
"""Of times on unit scale: TrigFlow's span 1.6, EDM's logarithms 2.6."""


class Point(NamedTuple):
    """Times of the teacher's schedule, with their TrigFlow angle theta."""

    t: Tensor
    """Times (B,)."""
    cos: Tensor
    """``cos(theta)``, (B, 1, ..., 1)."""
    sin: Tensor
    """``sin(theta)``, (B, 1, ..., 1)."""


class Scm(Distiller):
    """A student, and a loss weight that is learnt for every time."""

    optim_defaults: ClassVar = {"student": {"lr": 1e-4, "betas": (0.9, 0.99)}}
    sampling_options = frozenset({"steps"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of sCM."""

        steps: PositiveInt = 2
        """Sampling steps of the finished student."""
        path: Literal["teacher", "data"] = "teacher"
        """Source of the path's direction: distillation (sCD), or training on data alone (sCT)."""
        sigma_data: PositiveFloat = 0.5
        """The data's standard deviation; schedules that define one of their own keep it."""
        log_sigma_mean: FiniteFloat = -1.0
        """Mean of the log noise level ``log(sigma / alpha)`` in training (P_mean)."""
        log_sigma_std: PositiveFloat = 1.4
        """Its standard deviation (P_std)."""
        tangent: Literal["auto", "jvp", "difference"] = "auto"
        """The student's derivative: exact, by forward-mode differentiation, or by a difference of two calls; ``auto``
        is exact if the embedded time is on unit scale, see :func:`embeds_unit_times`."""
        difference: PositiveFloat = 0.04
        """Distance of these two calls, as an angle: 25 of a thousand timesteps; 0.04 to 0.1."""
        warmup: NonNegativeInt = 1000
        """Training steps until the tangent has its full weight (r = 1)."""
        norm_floor: PositiveFloat = 0.1
        """The tangent is divided by its root mean square over an image plus this (c)."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance baked into the student; 1 is none."""

        def __post_init__(self) -> None:
            if self.path == "data" and self.guidance_scale != 1:
                raise ValueError(f"guidance_scale: expected 1 with path 'data', got {self.guidance_scale}")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        schedule = family.schedule
        if isinstance(schedule, Karras) and config.steps > 1:
            rho = rho_through(schedule.sigma_data * math.tan(MIDDLE_ANGLE), schedule)
            return ConsistencyKarras(schedule, config.steps, points=config.steps + 1, rho=rho)
        return ConsistencySampler(schedule, schedule.grid(config.steps))

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        if differentiates(config, family.schedule):
            check_forward_mode(family)

    def build(self) -> None:
        self.is_exact = differentiates(self.config, self.schedule)
        defines = isinstance(self.schedule, (Karras, Trig))
        self.sigma_data = self.schedule.sigma_data if defines else self.config.sigma_data
        self.time_weight = TimeWeight()
        self.add_turn("student", self.loss, self.time_weight)

    # --------------------------------------------------------------------------------------------------- loss

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        point = self.draw_point(draws, batch.x0)
        noise = draws.normal_like(batch.x0)
        x_t = self.schedule.add_noise(batch.x0, noise, point.t)
        with self.computing_target(self.student):
            path = self.path(x_t, point.t, Prediction(batch.x0, noise), batch.cond)
            tangent_of = self.tangent_rule(x_t, point, path, batch.cond)
        student = self.student(x_t, point.t, batch.cond)
        tangent = tangent_of(Prediction(student.x0.detach(), student.eps.detach()))
        size = tangent.square().flatten(1).mean(1).sqrt()
        step = tangent / expand(size + self.config.norm_floor, tangent)
        velocity = self.velocity(student, point).float()
        error = (velocity - velocity.detach() - step).square().flatten(1).mean(1)
        log_weight = self.time_weight(point.t)
        return Losses(
            {"loss": (log_weight.exp() * error - log_weight).mean()},
            {"tangent": size.mean(), "error": error.detach().mean()},
        )

    def draw_point(self, draws: Draws, like: Tensor) -> Point:
        """Return points at log-normal noise levels, those below the lowest that networks know at the lowest."""
        normal = draws.normal().double()
        log_sigma = self.config.log_sigma_mean + self.config.log_sigma_std * normal
        return self.point(self.schedule.inverse(-2 * log_sigma).clamp(self.schedule.lowest_time, 1), like)

    def point(self, t: Tensor, like: Tensor) -> Point:
        """Return times (B,) of the teacher's schedule with their angle, in the shape of images ``like``."""
        alpha, sigma = self.schedule(t)
        radius = torch.hypot(alpha, sigma / self.sigma_data)
        return Point(t, expand(alpha / radius, like), expand(sigma / self.sigma_data / radius, like))

    def path(self, x_t: Tensor, t: Tensor, data: Prediction, cond: Cond) -> Prediction:
        """Return (x_0, eps) of the ODE path's direction at ``x_t``, float32 at least."""
        if self.config.path == "data":
            return data
        x_0, eps = self.guided_teacher(cond)(x_t, t)
        return Prediction(x_0.to(x_t.dtype), eps.to(x_t.dtype))

    def velocity(self, prediction: Prediction, point: Point) -> Tensor:
        """Return TrigFlow's F."""
        return prediction.velocity(point.cos, point.sin / self.sigma_data)

    def tangent_rule(self, x_t: Tensor, point: Point, path: Prediction, cond: Cond) -> Callable[[Prediction], Tensor]:
        """Return the tangent g of Algorithm 1, before its normalisation, as a function of the student's prediction."""
        if not self.is_exact:
            return self.tangent_by_difference(x_t, point, path, cond)
        student, (d_x_0, d_eps) = self.derive(x_t, point, path, cond)
        turn = point.cos * self.sigma_data * d_eps - point.sin * d_x_0
        tangent = -(point.cos**2) * self.residual(student, path, point) - self.tangent_warmup() * turn
        return lambda _: tangent

    def tangent_warmup(self) -> float:
        """Return r, the weight of the student's derivative, from 0 to 1."""
        return min(1.0, self.step_in_stage / self.config.warmup) if self.config.warmup else 1.0

    def residual(self, student: Prediction, path: Prediction, point: Point) -> Tensor:
        """Return ``sigma_d F - dx/dtheta``."""
        return self.sigma_data * (self.velocity(student, point) - self.velocity(path, point))

    def derive(self, x_t: Tensor, point: Point, path: Prediction, cond: Cond) -> tuple[Prediction, Prediction]:
        """Return the student's prediction, and its derivative by the log noise level along the path."""
        one = torch.ones_like(point.t)
        (alpha, sigma), (d_alpha, d_sigma) = torch.func.jvp(self.schedule, (point.t,), (one,))[:2]
        dt = alpha * sigma / (d_sigma * alpha - d_alpha * sigma)  # dt / d log(sigma / alpha)
        dx = path.to_state(expand(d_alpha * dt, x_t), expand(d_sigma * dt, x_t))
        return self.student.jvp(x_t, point.t, cond, dx, dt)

    def tangent_by_difference(
        self, x_t: Tensor, point: Point, path: Prediction, cond: Cond
    ) -> Callable[[Prediction], Tensor]:
        """Return the tangent of the discrete algorithm (dsCD, Appendix D), whose limit is g.

        At r = 1 it is the change of the consistency function itself over the angle. At any distance of the calls, its
        fixed point is that of consistency distillation by Euler steps of this angle.

        One of the two calls is the student's own, which has the gradient. A lower precision would leave rounding noise
        of the difference; then both are made again, in float32.
        """
        near = self.neighbour(point, x_t)
        x_near = ode_step(path, self.schedule, near.t)
        ends = expand(near.t == 0, x_t) > 0
        told = near.t.clamp(min=self.schedule.lowest_time)

        def tangent(here: Prediction, x_0_near: Tensor) -> Tensor:
            x_0_near = torch.where(ends, x_near, x_0_near)
            sin = point.sin * near.cos - point.cos * near.sin  # of the angle between them
            turned = -near.cos * self.residual(here, path, point)
            return point.cos * torch.lerp(turned, (here.x0 - x_0_near) / sin, self.tangent_warmup())

        if is_single_precision(self.bank, self.student.role, x_t.device):
            x_0_near = self.student(x_near, told, cond).x0
            return lambda here: tangent(here, x_0_near)
        both = {name: torch.cat([tensor, tensor]) for name, tensor in cond.items()}
        with single_precision(self.bank, self.student.role, x_t.device):
            x_0, eps = self.student(torch.cat([x_t, x_near]), torch.cat([point.t, told]), both)
        found = tangent(Prediction(x_0[: len(x_t)], eps[: len(x_t)]), x_0[len(x_t) :])
        return lambda _: found

    def neighbour(self, point: Point, like: Tensor) -> Point:
        """Return points lower by the angle ``difference``; those below what networks know become clean data.

        An angle is halved at most, so that the path's direction stays that at the point itself.
        """
        trig = Trig(self.sigma_data)
        theta = trig.inverse(self.schedule.log_snr(point.t))
        theta = torch.maximum(theta - self.config.difference / (math.pi / 2), theta / 2)
        t = self.schedule.inverse(trig.log_snr(theta))
        return self.point(torch.where(t < self.schedule.lowest_time, 0, t), like)


class TimeWeight(nn.Module):
    """The log weight w(t) of the loss; it grows where the error is small, until both balance."""

    def __init__(self, waves: int = 16) -> None:
        super().__init__()
        self.linear = nn.Linear(waves, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Return log weights (B,) of times (B,), 0 at first."""
        k = torch.arange(1, self.linear.in_features + 1, device=t.device)
        with torch.autocast(t.device.type, enabled=False):
            return self.linear((math.pi * k * t[:, None]).cos().to(self.linear.weight.dtype)).squeeze(1)


def embeds_unit_times(schedule: NoiseSchedule) -> bool:
    """Return whether the times that networks embed span a few units (EDM, TrigFlow), not a thousand timesteps.

    An embedding's waves turn by about a radian per unit. Over a thousand units, the derivative by the angle is that
    much larger, and belongs to waves between timesteps that training never showed: the tangent grows without bound (Lu
    & Song 2024, Section 4.1; SANA-Sprint, arXiv 2503.09641, which changes the teacher's time first).
    """
    ends = schedule.timestep(torch.tensor([schedule.lowest_time, 1.0], dtype=torch.float64))
    return (ends[1] - ends[0]).abs().item() < LARGEST_UNIT_SPAN


def differentiates(config: Scm.Config, schedule: NoiseSchedule) -> bool:
    """Return whether the student is differentiated exactly on a teacher of this schedule."""
    return config.tangent == "jvp" or (config.tangent == "auto" and embeds_unit_times(schedule))


def check_forward_mode(family: Family, key: str = "tangent") -> None:
    """Differentiate the teacher forward once, on one image.

    Args:
        family: the family of the teacher.
        key: the method's option that asks for it, and that has ``difference`` as another value.

    Raises:
        ValueError: if one of its operations has no forward derivative, such as a fused attention kernel.
    """
    x, t = torch.zeros(1, *family.sample_shape), torch.full((1,), 0.5, dtype=torch.float64)
    teacher = Denoiser(family, CopyBank(family.network), "teacher")
    try:
        teacher.jvp(x, t, family.example_cond([0]), x, t)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"method.{key}: 'jvp' needs a {type(family.network).__name__} that can be differentiated forward, got: "
            f"{reason} Set {key}: difference, or give the network its default attention processor."
        ) from error
