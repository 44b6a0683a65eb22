"""Noise levels that losses are evaluated at, and grids that students are rolled out on.

Times are those of a schedule. Where a flow's sampling grid is shifted towards noise, levels can be drawn uniformly and
shifted alike (``shift``); other schedules have a shift of 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.diffusion.shift import shifted
from stepdistill.randomness import Draws

MATCHED = (0.02, 0.98)
"""The range of times at which scores are compared: beyond it the divisor or the difference is uninformative."""

FIRST_BETA = (4.0, 1.5)
"""Where dynamic renoising begins, mostly noise; it ends at (1, 1), which is uniform."""

TINY = 1e-9
"""Quantiles are at least so far from 0 and 1, where they are infinite."""

INNER = (0.25, 0.95)
"""The range of the times of a random grid between the first, pure noise, and the end."""


def sample_times(schedule: NoiseSchedule, draws: Draws, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return uniform times (B,) between the shares ``low`` and ``high`` of the times that networks are trained at."""
    lowest = schedule.lowest_time
    return lowest + (1 - lowest) * draws.uniform(low, high)


def times_above(schedule: NoiseSchedule, draws: Draws, lowest: Tensor, high: float = 1.0) -> Tensor:
    """Return uniform times (B,) between ``lowest`` (B,), or the least that networks are trained at, and ``high``."""
    low = lowest.clamp(min=schedule.lowest_time)
    return low + (high - low).clamp(min=0) * draws.uniform()


def matched_times_above(schedule: NoiseSchedule, draws: Draws, lowest: Tensor) -> Tensor:
    """Return uniform times (B,) in :data:`MATCHED`, above ``lowest`` (B,)."""
    low, high = MATCHED
    return times_above(schedule, draws, lowest.clamp(min=low), high)


def shifted_times(schedule: NoiseSchedule, draws: Draws) -> Tensor:
    """Return uniform times (B,), shifted as the schedule's grid, in :data:`MATCHED` and at levels of training."""
    low, high = MATCHED
    return shifted(draws.uniform(), schedule.shift).clamp(max(low, schedule.lowest_time), high)


def log_normal_times(schedule: NoiseSchedule, draws: Draws, mean: float, std: float) -> Tensor:
    """Return times (B,) at log-normal noise levels: ``log(sigma / alpha)`` has this mean and standard deviation.

    On a flow they are logit-normal, ``sigmoid(mean + std n)``; on other schedules they have the same noise levels.
    """
    return schedule.inverse(-2 * (mean + std * draws.normal().double()))


def log_normal_times_above(schedule: NoiseSchedule, draws: Draws, mean: float, std: float, lowest: float) -> Tensor:
    """Return times (B,) as :func:`log_normal_times`, but of those levels only that are above the time ``lowest``."""
    time = max(lowest, schedule.lowest_time)
    # numbers on the CPU, and no validation, so that the host need not wait for the device
    centre, spread = torch.tensor([mean, std], dtype=torch.float64)
    normal = torch.distributions.Normal(centre, spread, validate_args=False)
    below = normal.cdf(-schedule.log_snr(torch.tensor(time, dtype=torch.float64)) / 2)
    log_sigma = normal.icdf((below + (1 - below) * draws.uniform()).clamp(TINY, 1 - TINY))
    return schedule.inverse(-2 * log_sigma).clamp(min=time)


def cleaner_times(schedule: NoiseSchedule, draws: Draws, t: Tensor, shift: float = 1.0) -> Tensor:
    """Return times (B,) from clean data up to ``t`` (B,), uniform before the shift."""
    u = draws.uniform() * shifted(t.double(), 1 / shift)
    return torch.minimum(shifted(u, shift).clamp(min=schedule.lowest_time), t.double())


def falling(progress: float) -> float:
    """Return a share that falls from 1 to 0 along half a cosine, as ``progress`` goes from 0 to 1."""
    return (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def dynamic_times(schedule: NoiseSchedule, draws: Draws, progress: float) -> Tensor:
    """Return times (B,) that are mostly noise at first and uniform in the end (DMDR, arXiv 2511.13649).

    Their Beta distribution changes from :data:`FIRST_BETA` to (1, 1) along a cosine of ``progress``, 0 to 1.
    """
    rest = falling(progress)
    a, b = (1 + (first - 1) * rest for first in FIRST_BETA)
    lowest, (low, high) = schedule.lowest_time, MATCHED
    return lowest + (1 - lowest) * (low + (high - low) * draws.beta(a, b))


def random_grid(schedule: NoiseSchedule, draws: Draws, fewest: int, most: int) -> Tensor:
    """Return the descending times of ``fewest`` to ``most`` steps from 1 to 0, the same in every process.

    The times between are uniform in :data:`INNER`, of a discrete process whole timesteps; two that fall together are
    one.
    """
    steps = draws.shared_integer(fewest, most + 1)
    low, high = INNER
    between = schedule.shortened(low + (high - low) * draws.shared_uniforms(steps - 1), 1.0)[1]
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([between, ends]).unique().flip(0)
