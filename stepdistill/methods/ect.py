r"""Easy consistency tuning (Geng et al. 2024, arXiv 2406.14548).

A diffusion model is a consistency model whose neighbour is clean data, ``x_s = x_0``. Tuning starts there, from the
teacher's weights, and moves the neighbour towards ``x_t``. With noise levels ``sigma`` at t and ``r`` at s,

.. math:: r = \max\left(0, \sigma \left(1 - q^{-(j + 1)} (1 + k\, \mathrm{sigmoid}(-b \sigma))\right)\right), \qquad
    \ln \sigma \sim N(m, v^2),

where the stage j counts up from 0. The target is the student itself, without gradient. A pseudo-Huber error is weighted
by ``1 / (sigma - r)``. Noise levels are EDM's, ``sigma_t / alpha_t``, for every schedule. The network's clean image
needs no boundary correction, because ``r = 0`` is exact.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import expand
from stepdistill.families.base import Family
from stepdistill.files.ranges import FiniteFloat, NonNegativeFloat, PositiveFloat, PositiveInt, Range
from stepdistill.losses.consistency import level_sampler, noise_to_signal, time_of_level
from stepdistill.losses.regression import pseudo_huber, weighted
from stepdistill.methods.base import Distiller, Losses
from stepdistill.randomness import Draws


def neighbour(sigma: Tensor, stage: int, q: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """Return the noise level r that ``sigma`` is paired with, 0 <= r < sigma.

    >>> [round(r, 4) for r in neighbour(torch.tensor([1.0, 10.0]), stage=0, q=2.0).tolist()]
    [0.0, 4.9982]
    """
    return (sigma * (1 - q ** -(stage + 1) * (1 + k * torch.sigmoid(-b * sigma)))).clamp(min=0)


class ECT(Distiller):
    """A student tuned from denoising to consistency."""

    sampling_options = frozenset({"steps", "mid_sigma"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of easy consistency tuning."""

        steps: PositiveInt = 2
        """Sampling steps."""
        q: Annotated[float, Range(above=1)] = 2.0
        """Factor by which the neighbour moves closer from stage to stage."""
        num_stages: PositiveInt = 8
        """Number of equal parts of the training; q = 256 in one part is the paper's short recipe."""
        sigma_max: PositiveFloat = 80.0
        """Largest noise level ``sigma_t / alpha_t``, where training ends and sampling starts; 80 is EDM's. A short
        training does better with about 25 times the data's deviation."""
        mid_sigma: PositiveFloat | None = None
        """Noise level halfway down the sampling grid, that of the second of two steps; by default the papers' 0.821 for
        EDM teachers, and an even grid for others."""
        noise_mean: FiniteFloat = -1.1
        """Mean m of ln sigma; larger values favour few sampling steps."""
        noise_std: PositiveFloat = 2.0
        """Standard deviation v of ln sigma."""
        huber: NonNegativeFloat = 0.00054
        """The pseudo-Huber constant, divided by the root of the number of pixels."""

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return level_sampler(family.schedule, config.steps, config.sigma_max, config.mid_sigma)

    def build(self) -> None:
        largest = time_of_level(self.schedule, self.config.sigma_max)
        ends = torch.tensor([self.schedule.lowest_time, largest], dtype=torch.float64)
        self.lowest, self.largest = noise_to_signal(self.schedule, ends).tolist()
        """Noise levels between which the student is trained."""
        self.add_turn("student", self.loss)

    @property
    def stage_index(self) -> int:
        """The stage j of the present step."""
        return self.step_in_stage * self.config.num_stages // max(1, self.stage.steps)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        config = self.config
        sigma = (config.noise_mean + config.noise_std * draws.normal().double()).exp().clamp(self.lowest, self.largest)
        r = neighbour(sigma, self.stage_index, config.q)
        r = torch.where(r < self.lowest, 0.0, r)  # there the network was never trained, and clean data is as near
        t, s = self.schedule.inverse(-2 * sigma.log()), self.schedule.inverse(-2 * r.log())
        noise = draws.normal_like(batch.x0)
        x_t = self.schedule.add_noise(batch.x0, noise, t)
        x_s = self.schedule.add_noise(batch.x0, noise, s)
        with self.computing_target(self.student):
            target = self.student(x_s, s, batch.cond).x0
        target = torch.where(expand(r == 0, target) > 0, batch.x0, target)
        error = pseudo_huber(self.student(x_t, t, batch.cond).x0, target, config.huber * math.sqrt(batch.x0[0].numel()))
        return Losses({"loss": weighted(1 / (sigma - r), error)})
