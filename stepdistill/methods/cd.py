r"""Consistency distillation (Song et al. 2023, arXiv 2303.01469, Algorithm 2).

The time axis is cut into N intervals. One solver step of the teacher across an interval leads from ``x_t`` to
``x_s``. The student learns to predict the same end of the trajectory from both,

.. math:: \| f_\theta(x_t, t) - f_{\theta^-}(\hat x_s, s) \|^2,

where the second prediction comes from a target network, whose weights are an average of the student's. At the optimum,
one step of the student equals N steps of the teacher's solver. N therefore bounds the student's quality from above, and
it is also the number of intervals across which the boundary condition has to spread.
"""

from __future__ import annotations

import dataclasses

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import Solver, solver_step
from stepdistill.diffusion.samplers import Sampler
from stepdistill.families.base import Family
from stepdistill.files.ranges import Decay, GuidanceScale, PositiveFloat, PositiveInt
from stepdistill.losses.consistency import consistency, consistency_sampler
from stepdistill.losses.perceptual import ConsistencyDistance, check_resemblance, open_distance
from stepdistill.methods.base import Distiller, Losses
from stepdistill.randomness import Draws


class CD(Distiller):
    """A student, its slowly moving target, and one teacher step between them."""

    sampling_options = frozenset({"steps", "mid_sigma"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of consistency distillation."""

        steps: PositiveInt = 2
        """Sampling steps; must divide ``intervals``."""
        intervals: PositiveInt = 40
        """Number of intervals of the time axis (N - 1 in the paper)."""
        solver: Solver = "heun"
        """The teacher's step across an interval: ``euler`` costs one network call, ``heun`` two."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance of the teacher, baked into the student; 1 is none."""
        distance: ConsistencyDistance = "huber"
        """A squared error starves the small residuals of low noise levels; ``lpips``, the paper's choice for images, is
        an optional dependency."""
        target_ema: Decay = 0.95
        """Decay of the target's average; at 0 the target is the student itself."""
        mid_sigma: PositiveFloat | None = None
        """Noise level halfway down the sampling grid, that of the second of two steps; by default the grid is even."""

        def __post_init__(self) -> None:
            if self.steps > 0 and self.intervals % self.steps:
                raise ValueError(f"intervals: expected a multiple of steps = {self.steps}, got {self.intervals}")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return consistency_sampler(family.schedule, config.steps, config.intervals, "intervals", config.mid_sigma)

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        check_resemblance(config.distance)

    def build(self) -> None:
        self.target = self.add_target(self.config.target_ema)
        self.distance = open_distance(self.config.distance, self.teacher)
        self.add_turn("student", self.loss)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        grid = self.times(self.schedule.trajectory, self.config.intervals, draws.device)
        i = draws.integers(0, self.config.intervals)
        t, s = grid[i], grid[i + 1]
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        with self.computing_target(self.target):
            x_s = solver_step(self.guided_teacher(batch.cond), x_t, t, s, self.schedule, self.config.solver)
            target = consistency(self.target, x_s, s, batch.cond)
        error = self.distance(consistency(self.student, x_t, t, batch.cond), target, batch.cond)
        return Losses({"loss": error.mean()})
