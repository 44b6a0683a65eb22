r"""Latent consistency models (Luo et al. 2023, arXiv 2310.04378); with adapters, LCM-LoRA (arXiv 2311.05556).

Consistency distillation that skips timesteps: with a grid of 50 of the teacher's 1000 timesteps, the pair
``(x_t, x_s)`` lies k = 20 timesteps apart, and a trajectory has 50 steps instead of 1000. The step from ``x_t`` to
``x_s`` is a DDIM step of the *guided* teacher,

.. math:: \hat x_0 = (1 + w)\, x_0^{cond} - w\, x_0^{null}, \qquad \hat\epsilon \text{ likewise}.

The student thereby learns guidance, and a sampling step costs one network call. Its guidance weight w is either fixed,
or an input of the student within a range. On the last interval ``s`` is clean data, and the target is the teacher's own
prediction: the boundary condition.
"""

from __future__ import annotations

import dataclasses

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import solver_step
from stepdistill.diffusion.samplers import Sampler
from stepdistill.families.base import Family, Inputs
from stepdistill.files import ranges
from stepdistill.losses import consistency, guidance_input, regression
from stepdistill.methods.base import Distiller, Losses
from stepdistill.randomness import Draws


class LCM(Distiller):
    """A student, its slowly moving target, and one DDIM step of the guided teacher between them."""

    sampling_options = frozenset({"steps", "mid_sigma"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of latent consistency distillation."""

        steps: ranges.PositiveInt = 4
        """Sampling steps."""
        solver_steps: ranges.PositiveInt = 50
        """DDIM steps of the teacher from noise to data: the grid that the student is trained on."""
        guidance_scale: ranges.GuidanceScale = 1.0
        """Guidance baked into the student, or its default where the scale is an input; 1 is none."""
        guidance_range: tuple[ranges.GuidanceScale, ...] = ()
        """Lowest and highest scale of a student that takes it as an input; by default the scale is fixed."""
        distance: regression.Distance = "huber"
        target_ema: ranges.Decay = 0.95
        """Decay of the target's average; at 0 the target is the student itself, as in LCM-LoRA."""
        mid_sigma: ranges.PositiveFloat | None = None
        """Noise level halfway down the sampling grid, that of the second of two steps; by default the grid is even."""

        def __post_init__(self) -> None:
            guidance_input.check_range(self.guidance_range, self.guidance_scale)

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return consistency.consistency_sampler(
            family.schedule, config.steps, config.solver_steps, "solver_steps", config.mid_sigma
        )

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        family.check_guidance(max(config.guidance_range, default=1.0))

    @classmethod
    def extra_inputs(cls, config: Config) -> Inputs:
        return Inputs(w=guidance_input.weights(config.guidance_range))

    def build(self) -> None:
        self.student.w = self.config.guidance_scale - 1 if self.config.guidance_range else None
        self.target = self.add_target(self.config.target_ema)
        self.add_turn("student", self.loss)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        grid = self.times(self.schedule.trajectory, self.config.solver_steps, draws.device)
        i = draws.integers(0, self.config.solver_steps)
        t, s = grid[i], grid[i + 1]
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        w = draws.uniform(*self.inputs.w) if self.inputs.w else None
        teacher = self.guided_teacher(batch.cond) if w is None else self.teacher.guided(batch.cond, w)
        with self.computing_target(self.target):
            x_s = solver_step(teacher, x_t, t, s, self.schedule)
            target = consistency.consistency(self.target, x_s, s, batch.cond, w)
        student = consistency.consistency(self.student, x_t, t, batch.cond, w)
        error = regression.distance(student, target, self.config.distance)
        return Losses({"loss": error.mean()})

    def contract(self) -> dict[str, object]:
        return {"guidance_range": list(self.config.guidance_range)}
