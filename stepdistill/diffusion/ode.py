"""Single steps of the probability-flow ODE and their inverses, and moves between schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from stepdistill.diffusion.prediction import Denoise, Prediction
from stepdistill.diffusion.schedule import NoiseSchedule, expand

Noise = Callable[[Tensor], Tensor]
"""A function that returns fresh unit Gaussian noise of the shape of its argument."""


def ode_step(prediction: Prediction, schedule: NoiseSchedule, s: Tensor) -> Tensor:
    """Take one DDIM (Euler) step of the probability-flow ODE to times ``s`` (B,)."""
    alpha_s, sigma_s = schedule.coefficients(s, prediction.x0)
    return prediction.to_state(alpha_s, sigma_s)


def clipped(prediction: Prediction, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Prediction:
    """Return the prediction with its clean image cut to [-1, 1], and the noise that is then left in ``x_t``."""
    x0 = prediction.x0.clamp(-1, 1)
    alpha_t, sigma_t = schedule.coefficients(t, x0)
    return Prediction(x0, (x_t - alpha_t * x0) / sigma_t)


def noise_up(x_s: Tensor, s: Tensor, t: Tensor, schedule: NoiseSchedule, noise: Noise) -> Tensor:
    """Add noise to states at times ``s`` (B,), so that they have the process's distribution at times ``t`` >= ``s``.

    Returns ``(alpha_t / alpha_s) x_s`` plus the noise that is missing.
    """
    alpha_s, sigma_s = schedule(s)
    alpha_t, sigma_t = schedule(t)
    ratio = alpha_t / alpha_s
    fresh = (sigma_t**2 - (ratio * sigma_s) ** 2).clamp(min=0).sqrt()
    return expand(ratio, x_s) * x_s + expand(fresh, x_s) * noise(x_s)


def invert_step(x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return the clean image whose single DDIM step from ``(x_t, t)`` lands on ``(x_s, s)``, in float64.

    ``x_0 = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)``: the target of progressive
    distillation (Salimans & Ho 2022, Eq. 8) and of TRACT. Numerator and divisor are differences of nearly equal
    numbers, hence the precision.
    """
    x_t, x_s = x_t.double(), x_s.double()
    alpha_t, sigma_t = schedule.coefficients(t, x_t)
    alpha_s, sigma_s = schedule.coefficients(s, x_t)
    ratio = sigma_s / sigma_t
    return (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)


Solver = Literal["euler", "heun"]


def solver_step(
    denoise: Denoise, x_t: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule, solver: Solver = "euler"
) -> Tensor:
    """Take one step of the probability-flow ODE from times ``t`` to ``s``, both (B,).

    ``heun`` is the trapezoidal rule of ``dx = x_0 dalpha + eps dsigma``. For EDM it is the step of Karras et al. 2022
    (arXiv 2206.00364), Algorithm 1; as there, the step to clean data stays an Euler (DDIM) step.
    """
    here = denoise(x_t, t)
    x_s = ode_step(here, schedule, s)
    if solver == "euler":
        return x_s
    there = denoise(x_s, s)
    alpha_t, sigma_t = schedule.coefficients(t, x_t)
    alpha_s, sigma_s = schedule.coefficients(s, x_t)
    x_heun = x_t + (alpha_s - alpha_t) * (here.x0 + there.x0) / 2 + (sigma_s - sigma_t) * (here.eps + there.eps) / 2
    return torch.where(expand(s == 0, x_t) > 0, x_s, x_heun)


def transfer(x_t: Tensor, t: Tensor, source: NoiseSchedule, target: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Return the same state on another schedule: ``(x, t)`` of equal log-SNR, where the probability-flow ODEs coincide.

    Args:
        x_t: states (B, ...) of ``source`` at times ``t`` (B,).
        t: times (B,) whose log-SNR lies in the range of ``target``.
        source: the schedule of the given states.
        target: the schedule of the returned states.
    """
    t_target = target.inverse(source.log_snr(t))
    alpha_t, sigma_t = source(t)
    alpha, sigma = target(t_target)
    # the radius sqrt(alpha^2 + sigma^2) scales both parts alike and never vanishes, unlike alpha or sigma alone
    scale = torch.hypot(alpha, sigma) / torch.hypot(alpha_t, sigma_t)
    return x_t * expand(scale, x_t), t_target
