r"""Average velocities: what leads from a state to an earlier one in a single step, and the identities they obey.

On a flow, ``x_t = (1 - t) x_0 + t eps``, the average velocity u of the path through ``x_t`` is that of its chord,

.. math:: x_r = x_t - (t - r) u(x_t, t, r), \qquad u(x_t, t, t) = v(x_t, t).

A network cannot be compared with it, but three identities know nothing of the path besides its velocity v:

- the differential one, ``u = v - (t - r) du/dt`` along the path at fixed r (MeanFlow, Geng et al. 2025, arXiv
  2505.13447, Eq. 6), and its finite form ``(t - r) u(x_t, t, r) = (t - s) v + (s - r) u(x_s, s, r)`` with
  ``x_s = x_t - (t - s) v``, which tends to it as s goes to t (alpha-Flow, arXiv 2510.20771);
- composition, ``(t - r) u(x_t, t, r) = (t - s) u(x_t, t, s) + (s - r) u(x_s, s, r)`` (SplitMeanFlow, Guo et al. 2025,
  2507.16884), in halves that of shortcut models (Frans et al. 2024, 2410.12557).

**Any schedule.** Every process is a flow up to the scale of its states: at the *flow time* ``sigma / (alpha + sigma)``
the state is ``x_t / (alpha_t + sigma_t)``. There the average velocity is ``eps - x_0`` of a prediction whose DDIM step
lands on ``x_r``. So states, steps and networks stay the teacher's own, and only times are converted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.diffusion.ode import ode_step
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import NoiseSchedule, expand
from stepdistill.losses.regression import mean_square

Average = Callable[[Tensor, Tensor, Tensor], Prediction]
"""A network's prediction at states (B, ...) and times (B,) for a step to times (B,)."""

LATEST = 1 - 1e-9
"""The last time at which a schedule is differentiated: at 1 it may say by a constant that there is no signal."""

STEEPNESS = 25.0
"""Of the sigmoid along which alpha-Flow's alpha falls."""

SMALLEST_ALPHA = 0.005
"""Below it, alpha-Flow's alpha is 0."""

RELAXATION, ROBUSTNESS = 0.5, 1e-3
"""Of flow-anchored consistency: the exponent of a target's share, and the floor of the error that divides the loss."""


class Interval(NamedTuple):
    """States, their times, and the times that a step from them ends at."""

    x_t: Tensor
    """States (B, ...)."""
    t: Tensor
    """Their times (B,)."""
    r: Tensor
    """Times (B,) in [0, t]."""


def flow_time(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return ``sigma / (alpha + sigma)`` at times (B,): 0 is clean data, 1 has no signal; float64."""
    alpha, sigma = schedule(t)
    return sigma / (alpha + sigma)


def time_at(schedule: NoiseSchedule, tau: Tensor) -> Tensor:
    """Return the times (B,) whose flow time is ``tau`` (B,); beyond the schedule's end it is 1."""
    return schedule.inverse(2 * (torch.log1p(-tau) - tau.log())).clamp(0, 1)


def gap(schedule: NoiseSchedule, interval: Interval) -> Tensor:
    """Return the interval's length in flow time, (B, 1, ..., 1)."""
    length = flow_time(schedule, interval.t) - flow_time(schedule, interval.r)
    return expand(length, interval.x_t)


# ---------------------------------------------------------------------------------------------------- targets


def direction(schedule: NoiseSchedule, path: Prediction, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return times (B,) below 1, and the derivatives by flow time of a path's states (B, ...) and of these times.

    Args:
        schedule: the schedule of both.
        path: clean image and noise of the path's velocity.
        t: times (B,).
    """
    t = t.clamp(max=LATEST)
    (alpha, sigma), (d_alpha, d_sigma) = torch.func.jvp(schedule, (t,), (torch.ones_like(t),))[:2]
    dt = (alpha + sigma) ** 2 / (d_sigma * alpha - d_alpha * sigma)
    return t, path.to_state(expand(d_alpha * dt, path.x0), expand(d_sigma * dt, path.x0)), dt


def central_difference(
    average: Average, path: Prediction, interval: Interval, step: float, schedule: NoiseSchedule
) -> Tensor:
    """Return the derivative (B, ...) of the average velocity by flow time along the path, of two calls.

    They are ``step`` of flow time above and below, or at the interval's end and at that of the schedule.
    """
    _, t, r = interval
    tau, low = flow_time(schedule, t), r.clamp(min=schedule.lowest_time)
    after = time_at(schedule, (tau + step).clamp(max=1.0))
    before = torch.maximum(time_at(schedule, (tau - step).clamp(min=0.0)), torch.minimum(low, t))
    up, down = (average(ode_step(path, schedule, s), s, r).flow() for s in (after, before))
    distance = flow_time(schedule, after) - flow_time(schedule, before)
    return (up - down) / expand(distance.clamp(min=torch.finfo(torch.float32).eps), up)


def interpolated(average: Average, path: Prediction, interval: Interval, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return the average velocity (B, ...) of a step along the path to times ``s`` (B,), and from there the network's.

    It is that of alpha-Flow, whose alpha is the share of the interval down to ``s``. NaN where the interval is empty.
    """
    rest = average(ode_step(path, schedule, s), s, interval.r)
    return torch.lerp(rest.flow(), path.flow(), share_above(schedule, interval, s))


def where_empty(interval: Interval, path: Prediction, target: Tensor) -> Tensor:
    """Return a target (B, ...) that is the path's velocity where the interval is empty."""
    return torch.where(expand(interval.t == interval.r, target) > 0, path.flow(), target)


def composed(average: Average, interval: Interval, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return the average velocity (B, ...) of the network's steps to times ``s`` (B,) and on from there.

    NaN where the interval is empty.
    """
    first = average(interval.x_t, interval.t, s)
    second = average(ode_step(first, schedule, s), s, interval.r)
    return torch.lerp(second.flow(), first.flow(), share_above(schedule, interval, s))


def falling_alpha(progress: float, least: float) -> float:
    """Return alpha-Flow's alpha, which falls from 1 to ``least`` along a sigmoid, as ``progress`` goes from 0 to 1."""
    alpha = least + (1 - least) / (1 + math.exp(min(STEEPNESS * (progress - 0.5), 700.0)))
    return alpha if alpha >= SMALLEST_ALPHA else 0.0


def guided_by_itself(
    data: Prediction, free: Prediction, own: Prediction, w: Tensor | float, kappa: float
) -> Prediction:
    """Return a guided velocity without a teacher, as predictions of one state (MeanFlow).

    Where ``own`` is what the network learns from it, its fixed point is guided. Without guidance it is the data's.

    Args:
        data: clean image and noise (B, ...) of the data.
        free: what the network predicts without a condition.
        own: what it predicts with it.
        w: guidance weights, (B,) or one; 0 is none.
        kappa: share of ``own``.
    """
    weight = expand(torch.as_tensor(w), data.x0)
    share = torch.where(weight == 0, 0.0, kappa)
    omega = (1 + weight) * (1 - share)
    parts = zip(data, free, own, strict=True)
    return Prediction(*(omega * v + (1 - omega - share) * v_free + share * v_own for v, v_free, v_own in parts))


def time_within(schedule: NoiseSchedule, t: Tensor, r: Tensor, share: Tensor | float) -> Tensor:
    """Return the times (B,) at which a ``share`` of the flow time from ``t`` to ``r`` is over, and networks know."""
    above, below = flow_time(schedule, t), flow_time(schedule, r)
    s = time_at(schedule, above + share * (below - above))
    return torch.maximum(s, r).clamp(min=schedule.lowest_time).minimum(t)


def share_above(schedule: NoiseSchedule, interval: Interval, s: Tensor) -> Tensor:
    """Return the share (B, 1, ..., 1) of the interval's flow time that lies above times ``s`` (B,)."""
    above, s_tau, below = (flow_time(schedule, time) for time in (interval.t, s, interval.r))
    return expand((above - s_tau) / (above - below), interval.x_t)


# ----------------------------------------------------------------------------------------------------- losses


def normalised(error: Tensor, power: float, floor: float) -> Tensor:
    """Return squared errors (B,) over ``(error + floor)^power``, a constant for the gradient (MeanFlow, Eq. 22)."""
    return error / (error.detach() + floor) ** power


def alpha_weight(interval: Interval, alpha: float, power: float) -> Tensor:
    """Return the weight (B,) of normalised errors under which a gradient's length knows no alpha (alpha-Flow).

    A residual has alpha as a factor, so its gradient has ``alpha^(1 - 2 power)``. That of an empty interval has none,
    and its weight is 1, as that of all is without an alpha (0).
    """
    return torch.where(interval.t == interval.r, 1.0, (alpha or 1.0) ** (2 * power - 1))


def flow_anchored(
    velocity: Tensor, mean: Tensor, anchor: Tensor, path: Tensor, tau: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the losses of flow-anchored consistency models (FACM, Peng et al. 2025, arXiv 2507.03738), and an error.

    Args:
        velocity: the student's average velocity (B, ...) to clean data.
        mean: its target before relaxation.
        anchor: the student's velocity at the same time.
        path: that of the path.
        tau: flow times (B,).

    Returns:
        the losses, and the squared error (B,) of the average velocity.
    """
    error = mean_square(velocity, relaxed(velocity.detach(), mean, tau))
    robust = normalised(error, 0.5, ROBUSTNESS)
    anchored = mean_square(anchor, path) + turned(anchor, path)
    weight = consistency_weight(tau).to(error.dtype)
    return {"consistency": (weight * robust).mean(), "anchor": anchored.mean()}, error


def relaxed(velocity: Tensor, mean: Tensor, tau: Tensor) -> Tensor:
    """Return a target between both velocities (B, ...): at high flow times (B,) ``mean``, at most 1 away per pixel.

    It is FACM's target.
    """
    share = expand(1 - (1 - tau) ** RELAXATION, velocity)
    return velocity - share * (velocity - mean).clamp(-1, 1)


def consistency_weight(tau: Tensor) -> Tensor:
    """Return FACM's weight (B,) of the consistency error at flow times (B,)."""
    return (math.pi / 2 * tau).sin()


def turned(velocity: Tensor, wanted: Tensor) -> Tensor:
    """Return one minus the cosine of the angle between velocities (B, C, ...), over channels: the mean, (B,)."""
    cosine = torch.nn.functional.cosine_similarity(velocity.float(), wanted.float(), dim=1)
    return 1 - cosine.flatten(1).mean(1)
