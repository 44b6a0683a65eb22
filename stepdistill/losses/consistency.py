r"""Consistency functions: constant along a trajectory of the teacher.

The probability-flow ODE carries every state ``x_t`` to one clean image. A *consistency function* maps any state of a
trajectory to that trajectory's end,

.. math:: f(x_t, t) = f(x_s, s), \qquad f(x, t_{end}) = x.

The second equation, the boundary condition, must hold by construction, since a constant satisfies the first. Where the
end is, and how the network's clean image is made to satisfy the boundary, depends on the schedule:

- variance preserving, flow, TrigFlow: the end is clean data, where ``sigma = 0`` and ``x_0 = x_t``;
- EDM: the end is ``sigma_min``, and ``f = c_skip x_t + c_out F`` with the shifted scalings of Song et al. 2023
  (arXiv 2303.01469, Appendix C), which are those of diffusers' ``CMStochasticIterativeScheduler``.

A student is trained on pairs ``(x_t, x_s)`` of neighbours on one trajectory. They are either joined by a step of the
(guided) teacher (CD, LCM, TCD), or made of the same image and noise (CT, iCT, ECT), which is right in expectation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.diffusion.samplers import ConsistencyKarras, ConsistencySampler, Sampler, rho_through
from stepdistill.diffusion.schedule import DiscreteVP, Karras, NoiseSchedule
from stepdistill.diffusion.trig import Trig
from stepdistill.networks.denoiser import Denoiser

EDM_MIDDLE = 0.821
"""Noise level of the second of two steps in the papers of ``ict`` and ``ect``, for CIFAR-10."""


def consistency(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
    """Return ``f(x_t, t)`` (B, ...) of a network, for times (B,) not below the trajectory's end."""
    return denoiser.schedule.end_point(denoiser(x_t, t, cond, w=w).x0, x_t, t)


def skip_grid(schedule: NoiseSchedule, steps: int, intervals: int) -> Tensor:
    """Return ``steps`` times of the trajectory in ``intervals``, at :func:`skip_places`, and 0.

    >>> from stepdistill.diffusion.schedule import DiscreteVP
    >>> vp = DiscreteVP((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
    >>> vp.timestep(skip_grid(vp, 4, 50))[:-1].round().int().tolist()
    [999, 759, 499, 259]
    """
    times = schedule.trajectory(intervals)[skip_places(schedule, steps, intervals)]
    return torch.cat([times, times.new_zeros(1)])


def skip_places(schedule: NoiseSchedule, steps: int, intervals: int) -> list[int]:
    """Return where in ``intervals`` each of ``steps`` begins, chosen as ``LCMScheduler`` and ``TCDScheduler`` do.

    EDM's scheduler takes even strides only.
    """
    if isinstance(schedule, Karras):
        return [intervals // steps * i for i in range(steps)]
    return [intervals * i // steps for i in range(steps)]


def consistency_sampler(
    schedule: NoiseSchedule, steps: int, intervals: int, key: str, mid_sigma: float | None = None
) -> Sampler:
    """Return multistep consistency sampling (Song et al. 2023, Algorithm 1) at times out of ``intervals``.

    Args:
        schedule: the networks' schedule.
        steps: sampling steps.
        intervals: intervals of the grid that the times are chosen from.
        key: the configuration key of ``intervals``.
        mid_sigma: the noise level that the middle of the grid is moved to, off the times of training; None moves none.

    Raises:
        ValueError: see :func:`check_intervals`.
    """
    check_intervals(schedule, steps, intervals, key)
    if isinstance(schedule, Karras):
        if mid_sigma is None:
            return ConsistencyKarras(schedule, steps, points=intervals + 1)
        return ConsistencyKarras(schedule, steps, points=steps + 1, rho=rho_through(mid_sigma, schedule))
    _, middle, _ = skip_grid(schedule, 2, intervals)
    return moved_sampler(schedule, skip_grid(schedule, steps, intervals), middle, mid_sigma)


def moved_sampler(schedule: NoiseSchedule, times: Tensor, middle: Tensor, mid_sigma: float | None) -> Sampler:
    """Return multistep consistency sampling at ``times``, or at those that :func:`moved_to` makes of them."""
    if mid_sigma is not None and len(times) > 2:
        times = moved_to(mid_sigma, schedule, times, middle)
    return ConsistencySampler(schedule, times)


def moved_to(mid_sigma: float, schedule: NoiseSchedule, times: Tensor, middle: Tensor) -> Tensor:
    """Return sampling times whose noise levels are multiplied by what takes that of ``middle`` to ``mid_sigma``.

    The first and the last time stay. Those of a discrete process are whole timesteps. On a flow it is one more shift.

    Raises:
        ValueError: if two times fall together, or the schedule is TrigFlow, whose scheduler has a grid of its own.
    """
    if isinstance(schedule, Trig):
        raise ValueError(f"method.mid_sigma: expected none for a TrigFlow teacher, got {mid_sigma}")
    factor = mid_sigma / noise_to_signal(schedule, middle)
    moved = schedule.inverse(-2 * (factor * noise_to_signal(schedule, times[1:-1])).log())
    whole = schedule.shortened(moved, 1.0)[1]
    result = torch.cat([times[:1], whole, times[-1:]])
    if not (result.diff() < 0).all():
        timesteps = schedule.timestep(result[:-1]).tolist()
        raise ValueError(f"method.mid_sigma: expected a level that keeps the timesteps apart, got {timesteps}")
    return result


def check_intervals(schedule: NoiseSchedule, steps: int, intervals: int, key: str) -> None:
    """Raise ``ValueError`` unless the time axis can be cut into ``intervals`` and sampled in ``steps``."""
    if not 1 <= steps <= intervals:
        raise ValueError(f"method.steps: expected 1 to {key} = {intervals}, got {steps}")
    if isinstance(schedule, DiscreteVP) and intervals > schedule.num_timesteps:
        limit = schedule.num_timesteps
        raise ValueError(f"method.{key}: expected at most the teacher's {limit} timesteps, got {intervals}")


def level_sampler(schedule: NoiseSchedule, steps: int, sigma_max: float, mid_sigma: float | None) -> Sampler:
    """Return multistep consistency sampling from the noise level ``sigma_max`` down.

    The first step is told that level, though its input is pure noise; the other times are those of the schedule's grid.

    Args:
        schedule: the networks' schedule.
        steps: sampling steps.
        sigma_max: ``sigma_t / alpha_t`` of the first step; a schedule that ends below it starts at its own end.
        mid_sigma: the noise level halfway down the grid; None is :data:`EDM_MIDDLE` for EDM, and moves no other grid.

    Raises:
        ValueError: if the second time is not below the first, an EDM schedule goes beyond ``sigma_max``, or no grid of
            it has this middle.
    """
    if steps < 1:
        raise ValueError(f"method.steps: expected at least 1, got {steps}")
    if isinstance(schedule, Karras):
        if schedule.sigma_max > sigma_max:
            raise ValueError(f"method.sigma_max: expected at least the teacher's {schedule.sigma_max}, got {sigma_max}")
        middle = EDM_MIDDLE if mid_sigma is None else mid_sigma
        return ConsistencyKarras(schedule, steps, points=steps + 1, rho=rho_through(middle, schedule))
    times = schedule.grid(steps).clone()
    times[0] = time_of_level(schedule, sigma_max)
    if mid_sigma is None and times[0] <= times[1]:
        raise ValueError(
            f"method.sigma_max: {sigma_max} is below the second of {steps} steps; expected more, or fewer steps"
        )
    return moved_sampler(schedule, times, schedule.grid(2)[1], mid_sigma)


def time_of_level(schedule: NoiseSchedule, sigma: float) -> float:
    """Return the time at which ``sigma_t / alpha_t`` is ``sigma``, or 1; of a discrete process a whole timestep."""
    t = schedule.inverse(torch.tensor([-2 * math.log(sigma)], dtype=torch.float64)).clamp(max=1)
    return schedule.shortened(t, 1.0)[1].item()


def karras_times(schedule: NoiseSchedule, intervals: int, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Return ``intervals + 1`` descending times: noise levels even in ``sigma^(1 / rho)``, then the trajectory's end.

    EDM's own trajectory is such a grid (Karras et al. 2022, Eq. 5).
    """
    if isinstance(schedule, Karras):
        return schedule.trajectory(intervals)
    ends = torch.tensor([time_of_level(schedule, sigma_max), schedule.lowest_time], dtype=torch.float64)
    top, bottom = noise_to_signal(schedule, ends).clamp(max=sigma_max) ** (1 / rho)
    levels = torch.lerp(top, bottom, torch.linspace(0, 1, intervals, dtype=torch.float64)) ** rho
    times = schedule.inverse(-2 * levels.log())
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def noise_to_signal(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return EDM's noise level ``sigma_t / alpha_t`` (B,), float64; infinite where there is no signal."""
    alpha_t, sigma_t = schedule(t)
    return sigma_t / alpha_t
