r"""Consistency training (Song et al. 2023, arXiv 2303.01469, Algorithm 3).

The neighbour of ``x_t = alpha_t x_0 + sigma_t z`` is ``x_s = alpha_s x_0 + sigma_s z``, the same image and noise: it
stands for the teacher's solver step without bias, but with a variance that only a fine grid makes harmless. Training
therefore starts coarse and ends fine, while the target follows ever more slowly (Appendix C):

.. math::
    N(k) = \left\lceil \sqrt{\tfrac{k}{K} ((s_1 + 1)^2 - s_0^2) + s_0^2} - 1 \right\rceil + 1, \qquad
    \mu(k) = \exp\!\left(s_0 \ln \mu_0 / N(k)\right).

The teacher gives the student its first weights and nothing more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family
from stepdistill.losses.consistency import check_intervals, consistency, consistency_sampler, shared_dropout, time_grid
from stepdistill.losses.perceptual import ConsistencyDistance, check_resemblance, open_distance
from stepdistill.methods.base import Distiller, Losses, Turn
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws


def num_points(step: int, steps: int, first: int, last: int) -> int:
    """N(k) for ``step`` k of ``steps`` K, from ``first`` s_0 to ``last`` s_1 + 1.

    >>> num_points(0, 1000, 2, 150), num_points(500, 1000, 2, 150), num_points(1000, 1000, 2, 150)
    (2, 107, 151)
    """
    return math.ceil(math.sqrt(step / steps * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def target_decay(points: int, first: int, decay: float) -> float:
    """mu(k) at N(k) = ``points``, where mu is ``decay`` at N = ``first``.

    >>> target_decay(2, 2, 0.9), round(target_decay(150, 2, 0.9), 4)
    (0.9, 0.9986)
    """
    return math.exp(first * math.log(decay) / points)


class CT(Distiller):
    """A student, its slow target, and a time axis that gets finer."""

    sampling_options: ClassVar = frozenset({"steps"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of consistency training."""

        steps: int = 2
        """Network calls of a sample."""
        first_points: int = 10
        """N at the start (s_0); the paper, from random weights, has 2."""
        last_points: int = 150
        """N at the end, less one (s_1)."""
        distance: ConsistencyDistance = "l2"
        """``lpips`` is the paper's choice for pictures; it is an extra."""
        first_decay: float = 0.9
        """mu at the start (mu_0)."""

        def __post_init__(self) -> None:
            if not 2 <= self.first_points <= self.last_points:
                raise ValueError(
                    "wanted 2 <= first_points <= last_points; "
                    f"found first_points {self.first_points}, last_points {self.last_points}"
                )
            if not 0 < self.first_decay < 1:
                raise ValueError(f"first_decay: found {self.first_decay}, wanted 0 < first_decay < 1")

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        check_resemblance(config.distance)
        check_intervals(family.schedule, config.steps, config.last_points, "last_points")
        to_diffusers(consistency_sampler(family.schedule, config.steps, config.last_points), family.scheduler_config)

    def build(self) -> Sequence[Turn]:
        self.bank.fork("target", "student", trainable=False)
        self.target = Denoiser(self.family, self.bank, "target")
        self.distance = open_distance(self.config.distance, self.teacher)
        return [Turn("student", self.bank.params("student"), self.loss)]

    def sampler(self) -> Sampler:
        return consistency_sampler(self.schedule, self.config.steps, self.config.last_points)

    @property
    def points(self) -> int:
        """N(k) of the present step."""
        return num_points(self.step_in_stage, self.stage.steps, self.config.first_points, self.config.last_points)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        grid = time_grid(self.schedule, self.points - 1).to(batch.x0.device)
        i = draws.integers(0, self.points - 1)
        t, s = grid[i], grid[i + 1]
        noise = draws.normal_like(batch.x0)
        x_t, x_s = (self.schedule.add_noise(batch.x0, noise, time) for time in (t, s))
        with torch.no_grad(), shared_dropout(self.bank, "target", x_s):
            target = consistency(self.target, x_s, s, batch.cond)
        error = self.distance(consistency(self.student, x_t, t, batch.cond), target, batch.cond)
        return Losses({"loss": error.mean()})

    def after_step(self) -> None:
        keep = target_decay(self.points, self.config.first_points, self.config.first_decay)
        self.bank.blend("target", "student", keep)
