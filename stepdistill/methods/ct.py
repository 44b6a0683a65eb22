r"""Consistency training (Song et al. 2023, arXiv 2303.01469, Algorithm 3).

The neighbour of ``x_t = alpha_t x_0 + sigma_t z`` is ``x_s = alpha_s x_0 + sigma_s z``, the same image with the same
noise. It replaces the teacher's solver step without bias, but with a variance that only a fine grid makes small.
Training therefore starts on a coarse grid and ends on a fine one, while the target moves ever more slowly
(Appendix C),

.. math::
    N(k) = \left\lceil \sqrt{\tfrac{k}{K} ((s_1 + 1)^2 - s_0^2) + s_0^2} - 1 \right\rceil + 1, \qquad
    \mu(k) = \exp\!\left(s_0 \ln \mu_0 / N(k)\right).

The teacher only provides the student's first weights.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.families.base import Family
from stepdistill.files.ranges import PositiveFloat, PositiveInt, Range
from stepdistill.losses.consistency import consistency, consistency_sampler
from stepdistill.losses.perceptual import ConsistencyDistance, check_resemblance, open_distance
from stepdistill.methods.base import Distiller, Losses
from stepdistill.randomness import Draws


def num_points(step: int, steps: int, first: int, last: int) -> int:
    """Return N(k) for ``step`` k of ``steps`` K, from ``first`` s_0 to ``last`` s_1 + 1.

    >>> num_points(0, 1000, 2, 150), num_points(500, 1000, 2, 150), num_points(1000, 1000, 2, 150)
    (2, 107, 151)
    """
    return math.ceil(math.sqrt(step / steps * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def target_decay(points: int, first: int, decay: float) -> float:
    """Return mu(k) at N(k) = ``points``, where mu is ``decay`` at N = ``first``.

    >>> target_decay(2, 2, 0.9), round(target_decay(150, 2, 0.9), 4)
    (0.9, 0.9986)
    """
    return math.exp(first * math.log(decay) / points)


class CT(Distiller):
    """A student, its slowly moving target, and a time grid that becomes finer."""

    sampling_options = frozenset({"steps", "mid_sigma"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of consistency training."""

        steps: PositiveInt = 2
        """Sampling steps."""
        first_points: Annotated[int, Range(at_least=2)] = 10
        """N at the start (s_0); the paper, which starts from random weights, uses 2."""
        last_points: Annotated[int, Range(at_least=2)] = 150
        """N - 1 at the end (s_1)."""
        distance: ConsistencyDistance = "huber"
        """A squared error starves the small residuals of low noise levels; ``lpips``, the paper's choice for images, is
        an optional dependency."""
        first_decay: Annotated[float, Range(above=0, below=1)] = 0.9
        """mu at the start (mu_0)."""
        mid_sigma: PositiveFloat | None = None
        """Noise level halfway down the sampling grid, that of the second of two steps; by default the grid is even."""

        def __post_init__(self) -> None:
            if self.first_points > self.last_points:
                raise ValueError(
                    f"first_points: expected 2 to last_points = {self.last_points}, got {self.first_points}"
                )

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return consistency_sampler(family.schedule, config.steps, config.last_points, "last_points", config.mid_sigma)

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        check_resemblance(config.distance)

    def build(self) -> None:
        first = self.config.first_points
        self.target = self.add_average("target", lambda: target_decay(self.points, first, self.config.first_decay))
        self.distance = open_distance(self.config.distance, self.teacher)
        self.add_turn("student", self.loss)

    @property
    def points(self) -> int:
        """N(k) of the present step."""
        return num_points(self.step_in_stage, self.stage.steps, self.config.first_points, self.config.last_points)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        grid = self.times(self.schedule.trajectory, self.points - 1, draws.device)
        i = draws.integers(0, self.points - 1)
        t, s = grid[i], grid[i + 1]
        noise = draws.normal_like(batch.x0)
        x_t = self.schedule.add_noise(batch.x0, noise, t)
        x_s = self.schedule.add_noise(batch.x0, noise, s)
        with self.computing_target(self.target):
            target = consistency(self.target, x_s, s, batch.cond)
        error = self.distance(consistency(self.student, x_t, t, batch.cond), target, batch.cond)
        return Losses({"loss": error.mean()})
