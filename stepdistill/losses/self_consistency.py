"""The loss of continuous-time consistency models, for teachers of any schedule.

The mathematics is in :mod:`stepdistill.methods.scm`; here is what that method shares with those that add another loss.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stepdistill.batch import Cond
from stepdistill.diffusion.ode import ode_step
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.samplers import ConsistencyKarras, Sampler, rho_through
from stepdistill.diffusion.schedule import Karras, NoiseSchedule, expand
from stepdistill.diffusion.trig import Trig
from stepdistill.families.base import Family
from stepdistill.files.ranges import FiniteFloat, GuidanceScale, NonNegativeInt, PositiveFloat, PositiveInt
from stepdistill.files.schema import refuse_unread
from stepdistill.losses.consistency import moved_sampler
from stepdistill.losses.levels import log_normal_times
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.modes import is_single_precision, shared_dropout, single_precision
from stepdistill.randomness import Draws

PathSource = Literal["teacher", "data"]

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyOptions:
    """Options that every method with this loss has."""

    steps: PositiveInt = 2
    """Sampling steps of the finished student."""
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
    mid_sigma: PositiveFloat | None = None
    """Noise level halfway down the sampling grid, that of the second of two steps; by default the grid is even, for EDM
    teachers the second step begins at the paper's angle of 1.1."""

    def __post_init__(self) -> None:
        refuse_unread(self, ["difference"], self.tangent == "jvp", "with tangent 'jvp'")


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


class ConsistencyLoss(NamedTuple):
    """The loss of a batch, and the student's predictions that it was computed on."""

    loss: Tensor
    """A scalar."""
    student: Prediction
    """What the student predicts, with its gradient."""
    t: Tensor
    """The times (B,) of its inputs."""
    metrics: dict[str, Tensor]


class SelfConsistency:
    """The distance of a student from a consistency function, by its derivative along the teacher's paths.

    It is a plain object, since the networks belong to the bank and the time weight to the method.

    Args:
        teacher: the teacher.
        student: the student; its schedule may tell the network other timesteps than the teacher's.
        options: the method's.
        time_weight: the weight that is learnt for every time.
        path: source of the path's direction.
    """

    def __init__(
        self, teacher: Denoiser, student: Denoiser, options: ConsistencyOptions, time_weight: TimeWeight,
        path: PathSource = "teacher",
    ) -> None:  # fmt: skip
        self.teacher = teacher
        self.student = student
        self.options = options
        self.time_weight = time_weight
        self.path_source = path
        self.schedule = teacher.schedule
        self.is_exact = differentiates(options, student.schedule)
        self.sigma_data = data_deviation(self.schedule, options.sigma_data)

    def __call__(self, x0: Tensor, cond: Cond, draws: Draws, step: int, w: Tensor | None = None) -> ConsistencyLoss:
        """Return the loss of Algorithm 1 at noised images, on a training step.

        Args:
            x0: clean images (B, ...).
            cond: conditioning of the batch.
            draws: source of noise levels and noise.
            step: training steps so far.
            w: guidance weights (B,) that the student is told; by default the fixed scale's, of which it is told none.
        """
        point = self.draw_point(draws, x0)
        noise = draws.normal_like(x0)
        x_t = self.schedule.add_noise(x0, noise, point.t)
        with torch.no_grad():
            path = self.path(x_t, point.t, Prediction(x0, noise), cond, w)
        student, tangent = self.student_and_tangent(x_t, point, path, cond, self.share(step), w)
        size = tangent.square().flatten(1).mean(1).sqrt()
        move = tangent / expand(size + self.options.norm_floor, tangent)
        velocity = self.velocity(student, point).float()
        error = (velocity - velocity.detach() - move).square().flatten(1).mean(1)
        log_weight = self.time_weight(point.t)
        loss = (log_weight.exp() * error - log_weight).mean()
        return ConsistencyLoss(loss, student, point.t, {"tangent": size.mean(), "error": error.detach().mean()})

    def share(self, step: int) -> float:
        """Return r, the weight of the student's derivative on a training step, from 0 to 1."""
        return min(1.0, step / self.options.warmup) if self.options.warmup else 1.0

    def draw_point(self, draws: Draws, like: Tensor) -> Point:
        """Return points at log-normal noise levels, those below the lowest that networks know at the lowest."""
        t = log_normal_times(self.schedule, draws, self.options.log_sigma_mean, self.options.log_sigma_std)
        return self.point(t.clamp(self.schedule.lowest_time, 1), like)

    def point(self, t: Tensor, like: Tensor) -> Point:
        """Return times (B,) of the teacher's schedule with their angle, in the shape of images ``like``."""
        alpha, sigma = self.schedule(t)
        radius = torch.hypot(alpha, sigma / self.sigma_data)
        return Point(t, expand(alpha / radius, like), expand(sigma / self.sigma_data / radius, like))

    def path(self, x_t: Tensor, t: Tensor, data: Prediction, cond: Cond, w: Tensor | None = None) -> Prediction:
        """Return (x_0, eps) of the ODE path's direction at ``x_t``, float32 at least."""
        if self.path_source == "data":
            return data
        x_0, eps = self.teacher.guided(cond, self.options.guidance_scale - 1 if w is None else w)(x_t, t)
        return Prediction(x_0.to(x_t.dtype), eps.to(x_t.dtype))

    def velocity(self, prediction: Prediction, point: Point) -> Tensor:
        """Return TrigFlow's F."""
        return prediction.velocity(point.cos, point.sin / self.sigma_data)

    def student_and_tangent(
        self, x_t: Tensor, point: Point, path: Prediction, cond: Cond, share: float, w: Tensor | None = None
    ) -> tuple[Prediction, Tensor]:
        """Return the student's prediction with its gradient, and the tangent g of Algorithm 1 before normalisation.

        ``share`` is r, and ``w`` the guidance weights (B,) that the student is told.
        """
        if self.is_exact:
            return self.by_derivative(x_t, point, path, cond, share, w)
        return self.by_difference(x_t, point, path, cond, share, w)

    def by_derivative(
        self, x_t: Tensor, point: Point, path: Prediction, cond: Cond, share: float, w: Tensor | None
    ) -> tuple[Prediction, Tensor]:
        """Return the same, by the student's derivative along the path."""
        dx, dt = self.direction(point, path)
        student, here, (d_x_0, d_eps) = self.student.with_derivative(x_t, point.t, cond, dx, dt, w=w)
        turn = point.cos * self.sigma_data * d_eps - point.sin * d_x_0
        return student, -(point.cos**2) * self.residual(here, path, point) - share * turn

    def by_difference(
        self, x_t: Tensor, point: Point, path: Prediction, cond: Cond, share: float, w: Tensor | None
    ) -> tuple[Prediction, Tensor]:
        """Return the same by the discrete algorithm (dsCD, Appendix D), whose limit is g.

        At r = 1 the tangent is the change of the consistency function itself over the angle. At any distance of the
        calls, its fixed point is that of consistency distillation by Euler steps of this angle.

        One of the two calls is the student's own, which has the gradient. A lower precision would leave rounding noise
        of the difference; then both are made again, in float32.
        """
        bank, role = self.student.bank, self.student.role
        near = self.neighbour(point, x_t)
        x_near = ode_step(path, self.schedule, near.t)
        t_near = near.t.clamp(min=self.schedule.lowest_time)
        again = not is_single_precision(bank, role, x_t.device)
        # without gradient, and with the dropout masks that the student draws next
        with torch.no_grad(), shared_dropout(bank, role):
            if again:
                here, x_0_near = self.two_calls(x_t, point.t, x_near, t_near, cond, w)
            else:
                x_0_near = self.student(x_near, t_near, cond, w=w).x0
        student = self.student(x_t, point.t, cond, w=w)
        if not again:
            here = Prediction(student.x0.detach(), student.eps.detach())
        x_0_near = torch.where(expand(near.t == 0, x_t) > 0, x_near, x_0_near)
        sin = point.sin * near.cos - point.cos * near.sin  # of the angle between them
        turned = -near.cos * self.residual(here, path, point)
        return student, point.cos * torch.lerp(turned, (here.x0 - x_0_near) / sin, share)

    def two_calls(
        self, x_t: Tensor, t: Tensor, x_near: Tensor, t_near: Tensor, cond: Cond, w: Tensor | None
    ) -> tuple[Prediction, Tensor]:
        """Return the student's prediction at ``x_t``, and its clean image at ``x_near``, both in float32."""
        both = {name: torch.cat([tensor, tensor]) for name, tensor in cond.items()}
        weights = None if w is None else torch.cat([w, w])
        with single_precision(self.student.bank, self.student.role, x_t.device):
            x_0, eps = self.student(torch.cat([x_t, x_near]), torch.cat([t, t_near]), both, w=weights)
        return Prediction(x_0[: len(x_t)], eps[: len(x_t)]), x_0[len(x_t) :]

    def residual(self, student: Prediction, path: Prediction, point: Point) -> Tensor:
        """Return ``sigma_d F - dx/dtheta``."""
        return self.sigma_data * (self.velocity(student, point) - self.velocity(path, point))

    def direction(self, point: Point, path: Prediction) -> tuple[Tensor, Tensor]:
        """Return the derivatives of a path's states (B, ...) and of the times (B,) by the log noise level."""
        one = torch.ones_like(point.t)
        (alpha, sigma), (d_alpha, d_sigma) = torch.func.jvp(self.schedule, (point.t,), (one,))[:2]
        dt = alpha * sigma / (d_sigma * alpha - d_alpha * sigma)  # dt / d log(sigma / alpha)
        return path.to_state(expand(d_alpha * dt, path.x0), expand(d_sigma * dt, path.x0)), dt

    def neighbour(self, point: Point, like: Tensor) -> Point:
        """Return points lower by the angle ``difference``; those below what networks know become clean data.

        An angle is halved at most, so that the path's direction stays that at the point itself.
        """
        trig = Trig(self.sigma_data)
        theta = trig.inverse(self.schedule.log_snr(point.t))
        theta = torch.maximum(theta - self.options.difference / (math.pi / 2), theta / 2)
        t = self.schedule.inverse(trig.log_snr(theta))
        return self.point(torch.where(t < self.schedule.lowest_time, 0, t), like)


def data_deviation(schedule: NoiseSchedule, otherwise: float) -> float:
    """Return the standard deviation of the data: the schedule's, where it defines one."""
    return schedule.sigma_data if isinstance(schedule, (Karras, Trig)) else otherwise


def angle_sampler(steps: int, schedule: NoiseSchedule, mid_sigma: float | None) -> Sampler:
    """Return the sampler of a student: even on its schedule, of EDM's levels the paper's, or moved to ``mid_sigma``."""
    if isinstance(schedule, Karras) and steps > 1:
        middle = schedule.sigma_data * math.tan(MIDDLE_ANGLE) if mid_sigma is None else mid_sigma
        return ConsistencyKarras(schedule, steps, points=steps + 1, rho=rho_through(middle, schedule))
    return moved_sampler(schedule, schedule.grid(steps), schedule.grid(2)[1], mid_sigma)


def angle_grid(schedule: NoiseSchedule, angles: Sequence[float], sigma_data: float) -> Tensor:
    """Return the times at TrigFlow's ``angles``, descending and below pi / 2, and 0; of betas whole timesteps."""
    sigma_data = data_deviation(schedule, sigma_data)
    t = schedule.inverse(-2 * (sigma_data * torch.tensor(angles, dtype=torch.float64).tan()).log())
    return torch.cat([schedule.shortened(t, 1.0)[1], torch.zeros(1, dtype=torch.float64)])


def embeds_unit_times(schedule: NoiseSchedule) -> bool:
    """Return whether the times that networks embed span a few units (EDM, TrigFlow), not a thousand timesteps.

    An embedding's waves turn by about a radian per unit. Over a thousand units, the derivative by the angle is that
    much larger, and belongs to waves between timesteps that training never showed: the tangent grows without bound (Lu
    & Song 2024, Section 4.1; SANA-Sprint, arXiv 2503.09641, which changes the teacher's time first).
    """
    ends = schedule.timestep(torch.tensor([schedule.lowest_time, 1.0], dtype=torch.float64))
    return (ends[1] - ends[0]).abs().item() < LARGEST_UNIT_SPAN


def differentiates(options: ConsistencyOptions, schedule: NoiseSchedule) -> bool:
    """Return whether the student is differentiated exactly on a teacher of this schedule."""
    return options.tangent == "jvp" or (options.tangent == "auto" and embeds_unit_times(schedule))


def check_derivative(options: ConsistencyOptions, family: Family) -> None:
    """Raise ``ValueError`` if the student is to be differentiated exactly and cannot be."""
    if differentiates(options, family.schedule):
        check_forward_mode(family)


def check_forward_mode(family: Family, key: str = "tangent") -> None:
    """Differentiate the teacher forward once, on one image, also by torch alone.

    Args:
        family: the family of the teacher.
        key: the method's option that asks for it, and that has ``difference`` as another value.

    Raises:
        ValueError: if one of its operations has no forward derivative, such as a fused attention kernel.
    """
    count = math.prod(family.sample_shape)
    x, t = torch.linspace(-1, 1, count).view(1, *family.sample_shape), torch.full((1,), 0.5, dtype=torch.float64)
    place = (x, t, family.example_cond([0]), torch.ones_like(x), t)
    teacher = Denoiser(family, CopyBank(family.network), "teacher")
    try:
        expected, found = teacher.jvp_by_torch(*place)[1].x0, teacher.jvp(*place)[1].x0
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(_no_forward_mode(family, key, str(error).splitlines()[0])) from error
    rounding = 4 * torch.finfo(next(family.network.parameters()).dtype).eps ** 0.5
    if not (found - expected).norm() <= rounding * expected.norm():  # so that NaN is refused
        raise ValueError(_no_forward_mode(family, key, "an operation whose derivative is lost."))


def _no_forward_mode(family: Family, key: str, reason: str) -> str:
    return (
        f"method.{key}: 'jvp' needs a {type(family.network).__name__} that can be differentiated forward, got: "
        f"{reason} Set {key}: difference, or give the network its default attention processor."
    )
