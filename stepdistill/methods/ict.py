r"""Improved consistency training (Song & Dhariwal 2023, arXiv 2310.14189).

Consistency training (:mod:`stepdistill.methods.ct`) with five changes. The target is the student itself, because an
average biases it. The distance is pseudo-Huber. The number of intervals doubles in steps,

.. math:: N(k) = \min(s_0 2^{\lfloor k / K' \rfloor}, s_1) + 1, \qquad
    K' = \left\lfloor K / (\lfloor \log_2 (s_1 / s_0) \rfloor + 1) \right\rfloor.

Intervals are drawn from a discretised log-normal distribution of noise levels instead of uniformly. And an error is
weighted by ``1 / (sigma_t - sigma_s)``. Noise levels are EDM's, ``sigma_t / alpha_t``, for every schedule, and so is
the grid: even in ``sigma^(1 / 7)``, up to ``sigma_max``. A grid even in the time of a schedule whose
noise goes to infinity would hold one interval without weight where sampling starts.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.families.base import Family
from stepdistill.files.ranges import FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt
from stepdistill.losses.consistency import consistency, karras_times, level_sampler, noise_to_signal
from stepdistill.losses.regression import pseudo_huber, weighted
from stepdistill.methods.base import Distiller, Losses
from stepdistill.randomness import Draws


def num_intervals(step: int, steps: int, first: int, last: int) -> int:
    """Return N(k) - 1 for ``step`` k of ``steps`` K, doubling from ``first`` s_0 to ``last`` s_1.

    >>> [num_intervals(step, 800, 10, 1280) for step in (0, 99, 100, 700, 799)]
    [10, 10, 20, 1280, 1280]
    """
    stretch = max(1, steps // (int(math.log2(last / first)) + 1))
    return min(first * 2 ** (step // stretch), last)


def lognormal_shares(sigma: Tensor, mean: float, std: float) -> Tensor:
    """Return the probability (n,) under a log-normal of each interval between ``n + 1`` descending noise levels.

    Song & Dhariwal 2023, Eq. 6: ``erf((ln sigma_{i+1} - mean) / (sqrt(2) std)) - erf((ln sigma_i - mean) / ...)``,
    divided by their sum.
    """
    below = torch.erf((sigma.log() - mean) / (math.sqrt(2) * std))
    shares = below[:-1] - below[1:]
    return shares / shares.sum()


class ICT(Distiller):
    """A student that is its own target."""

    sampling_options = frozenset({"steps", "mid_sigma"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of improved consistency training."""

        steps: PositiveInt = 2
        """Sampling steps."""
        first_intervals: PositiveInt = 10
        """Intervals of the time axis at the start (s_0)."""
        last_intervals: PositiveInt = 640
        """Intervals at the end (s_1); the paper has 1280."""
        sigma_max: PositiveFloat = 80.0
        """Largest noise level ``sigma_t / alpha_t``, where training ends and sampling starts; 80 is EDM's. A short
        training does better with about 25 times the data's deviation."""
        mid_sigma: PositiveFloat | None = None
        """Noise level halfway down the sampling grid, that of the second of two steps; by default the papers' 0.821 for
        EDM teachers, and an even grid for others."""
        noise_mean: FiniteFloat = -1.1
        """Mean of ln sigma."""
        noise_std: PositiveFloat = 2.0
        """Standard deviation of ln sigma."""
        huber: NonNegativeFloat = 0.00054
        """The pseudo-Huber constant, divided by the root of the number of pixels."""

        def __post_init__(self) -> None:
            if self.first_intervals > self.last_intervals:
                raise ValueError(
                    f"first_intervals: expected 1 to last_intervals = {self.last_intervals}, got {self.first_intervals}"
                )

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return level_sampler(family.schedule, config.steps, config.sigma_max, config.mid_sigma)

    def build(self) -> None:
        self.add_turn("student", self.loss)

    @property
    def intervals(self) -> int:
        """N(k) - 1 of the present step."""
        first, last = self.config.first_intervals, self.config.last_intervals
        return num_intervals(self.step_in_stage, self.stage.steps, first, last)

    def levels(self, intervals: int) -> Tensor:
        """Return the training grid of ``intervals`` intervals, from ``sigma_max`` to the trajectory's end."""
        return karras_times(self.schedule, intervals, self.config.sigma_max)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        grid = self.times(self.levels, self.intervals, draws.device)
        sigma = noise_to_signal(self.schedule, grid)
        shares = lognormal_shares(sigma, self.config.noise_mean, self.config.noise_std)
        i = torch.searchsorted(shares.cumsum(0), draws.uniform()).clamp(max=self.intervals - 1)
        t, s = grid[i], grid[i + 1]
        noise = draws.normal_like(batch.x0)
        x_t = self.schedule.add_noise(batch.x0, noise, t)
        x_s = self.schedule.add_noise(batch.x0, noise, s)
        with self.computing_target(self.student):
            target = consistency(self.student, x_s, s, batch.cond)
        c = self.config.huber * math.sqrt(batch.x0[0].numel())
        error = pseudo_huber(consistency(self.student, x_t, t, batch.cond), target, c)
        return Losses({"loss": weighted(1 / (sigma[i] - sigma[i + 1]), error)})
