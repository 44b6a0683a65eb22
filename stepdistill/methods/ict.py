r"""Improved consistency training (Song & Dhariwal 2023, arXiv 2310.14189).

Consistency training (:mod:`stepdistill.methods.ct`) with five changes: the target is the student itself, without an
average, which would bias it; the distance is pseudo-Huber; the grid doubles in steps,

.. math:: N(k) = \min(s_0 2^{\lfloor k / K' \rfloor}, s_1) + 1, \qquad
    K' = \left\lfloor K / (\lfloor \log_2 (s_1 / s_0) \rfloor + 1) \right\rfloor;

noise levels follow a discretised log-normal distribution instead of the grid's own; and an error counts for
``1 / (sigma_t - sigma_s)``. Noise levels are EDM's, ``sigma_t / alpha_t``, whatever the schedule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family
from stepdistill.losses.consistency import (
    check_intervals,
    consistency,
    consistency_sampler,
    noise_to_signal,
    shared_dropout,
    time_grid,
)
from stepdistill.losses.regression import pseudo_huber, weighted
from stepdistill.methods.base import Distiller, Losses, Turn
from stepdistill.networks.bank import STUDENT
from stepdistill.randomness import Draws


def num_intervals(step: int, steps: int, first: int, last: int) -> int:
    """N(k) - 1 for ``step`` k of ``steps`` K, doubling from ``first`` s_0 to ``last`` s_1.

    >>> [num_intervals(step, 800, 10, 1280) for step in (0, 99, 100, 700, 799)]
    [10, 10, 20, 1280, 1280]
    """
    stretch = max(1, steps // (int(math.log2(last / first)) + 1))
    return min(first * 2 ** (step // stretch), last)


def lognormal_shares(sigma: Tensor, mean: float, std: float) -> Tensor:
    """The probability (n,) of each interval between ``n + 1`` descending noise levels under a log-normal, summing to 1.

    Song & Dhariwal 2023, Eq. 6: ``erf((ln sigma_{i+1} - mean) / (sqrt(2) std)) - erf((ln sigma_i - mean) / ...)``.
    """
    below = torch.erf((sigma.log() - mean) / (math.sqrt(2) * std))
    shares = below[:-1] - below[1:]
    return shares / shares.sum()


class ICT(Distiller):
    """A student that is its own target."""

    sampling_options: ClassVar = frozenset({"steps"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of improved consistency training."""

        steps: int = 2
        """Network calls of a sample."""
        first_intervals: int = 10
        """Intervals of the time axis at the start (s_0)."""
        last_intervals: int = 640
        """Intervals at the end (s_1); the paper has 1280, a teacher of 1000 timesteps no room for them."""
        noise_mean: float = -1.1
        """Mean of ln sigma."""
        noise_std: float = 2.0
        """Standard deviation of ln sigma."""
        huber: float = 0.00054
        """The pseudo-Huber constant, times the root of the number of pixels."""

        def __post_init__(self) -> None:
            if not 1 <= self.first_intervals <= self.last_intervals:
                raise ValueError(
                    "wanted 1 <= first_intervals <= last_intervals; "
                    f"found first_intervals {self.first_intervals}, last_intervals {self.last_intervals}"
                )

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        check_intervals(family.schedule, config.steps, config.last_intervals, "last_intervals")
        to_diffusers(consistency_sampler(family.schedule, config.steps, config.last_intervals), family.scheduler_config)

    def build(self) -> Sequence[Turn]:
        return [Turn("student", self.bank.params("student"), self.loss)]

    def sampler(self) -> Sampler:
        return consistency_sampler(self.schedule, self.config.steps, self.config.last_intervals)

    @property
    def intervals(self) -> int:
        """N(k) - 1 of the present step."""
        return num_intervals(
            self.step_in_stage, self.stage.steps, self.config.first_intervals, self.config.last_intervals
        )

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        grid = time_grid(self.schedule, self.intervals).to(batch.x0.device)
        sigma = noise_to_signal(self.schedule, grid)
        shares = lognormal_shares(sigma, self.config.noise_mean, self.config.noise_std)
        i = torch.searchsorted(shares.cumsum(0), draws.uniform()).clamp(max=self.intervals - 1)
        t, s = grid[i], grid[i + 1]
        noise = draws.normal_like(batch.x0)
        x_t, x_s = (self.schedule.add_noise(batch.x0, noise, time) for time in (t, s))
        with torch.no_grad(), shared_dropout(self.bank, STUDENT, x_s):
            target = consistency(self.student, x_s, s, batch.cond)
        c = self.config.huber * math.sqrt(batch.x0[0].numel())
        error = pseudo_huber(consistency(self.student, x_t, t, batch.cond), target, c)
        return Losses({"loss": weighted(1 / (sigma[i] - sigma[i + 1]), error)})
