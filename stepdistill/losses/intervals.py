"""Pairs of times that average velocities are trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import FINEST, NoiseSchedule
from stepdistill.losses.levels import log_normal_times
from stepdistill.randomness import Draws


def shifted_log_normal_times(schedule: NoiseSchedule, draws: Draws, mean: float, std: float) -> Tensor:
    """Return times (B,) as :func:`~stepdistill.losses.levels.log_normal_times`, the mean moved by a flow's shift.

    Those below the lowest that networks are trained at become that one.
    """
    mean = mean + math.log(schedule.shift)
    return log_normal_times(schedule, draws, mean, std).clamp(schedule.lowest_time, 1)


def free_interval(
    schedule: NoiseSchedule, draws: Draws, levels: tuple[float, float], from_noise: float, to_clean: float
) -> tuple[Tensor, Tensor]:
    """Return times ``r <= t``, each (B,), both log-normal.

    Args:
        schedule: the schedule of the times.
        draws: source of random numbers.
        levels: mean and standard deviation of the log noise level.
        from_noise: share of pairs whose ``t`` is 1.
        to_clean: share of pairs whose ``r`` is 0.
    """
    one, two = (shifted_log_normal_times(schedule, draws, *levels) for _ in range(2))
    t = torch.where(draws.uniform() < from_noise, 1.0, torch.maximum(one, two))
    return t, torch.where(draws.uniform() < to_clean, 0.0, torch.minimum(one, two))


def dyadic_interval(schedule: NoiseSchedule, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Return a step of a sampler of 1, 2, 4, ... or 64 steps, and its middle: times ``t > s > r``, each (B,)."""
    grid = schedule.grid(FINEST).to(draws.device)
    length = FINEST >> draws.integers(0, FINEST.bit_length() - 1)
    begin = (draws.uniform() * (FINEST // length)).long() * length
    return grid[begin], grid[begin + length // 2], grid[begin + length]
