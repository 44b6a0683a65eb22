r"""sCM: continuous-time consistency models (Lu & Song 2024, arXiv 2410.11081), for teachers of any schedule.

A consistency model f maps every point of an ODE path to the path's end, so it must not change along the path. TrigFlow
parametrises the path by an angle theta, ``x = cos(theta) x_0 + sin(theta) z``, where z is noise with the standard
deviation sigma_d of the data. Its network F predicts the velocity ``sigma_d F = cos(theta) z - sin(theta) x_0``, and
``f = cos(theta) x - sin(theta) sigma_d F``. Algorithm 1 moves F against the tangent

.. math:: g = -\cos^2\theta (\sigma_d F - \dot x)
    - r (\cos\theta \sin\theta x + \sigma_d \dot F \cos\theta \sin\theta), \qquad r: 0 \to 1,

which at r = 1 is ``cos(theta) df/dtheta``. The direction ``dx/dtheta`` of the path comes from the teacher (sCD), or
from the data and noise that x is made of (sCT).

**Any teacher, without a change of architecture.** Schedules differ by a scale of the state, on which (x_0, eps) do not
depend. A network of any schedule is therefore a TrigFlow network with ``theta = atan(sigma / (alpha sigma_d))`` and
``z = sigma_d eps``, and all is computed in the teacher's own coordinates. The derivative by the angle, times cos sin,
is that by the log noise level ``nu = log(sigma / alpha)``. With the student's derivatives (x_0', eps') by nu,

.. math:: \cos\theta \sin\theta x + \sigma_d \dot F \cos\theta \sin\theta
    = \cos\theta \sigma_d \epsilon' - \sin\theta x_0'.

The finished student predicts x_0 and is sampled like every consistency model. On a native TrigFlow schedule, its
sampler is diffusers' ``SCMScheduler``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import Sampler
from stepdistill.families.base import Family
from stepdistill.losses.self_consistency import (
    ConsistencyOptions,
    PathSource,
    SelfConsistency,
    TimeWeight,
    angle_sampler,
    check_derivative,
)
from stepdistill.methods.base import Distiller, Losses
from stepdistill.randomness import Draws


class Scm(Distiller):
    """A student, and a loss weight that is learnt for every time."""

    optim_defaults: ClassVar = {"student": {"lr": 1e-4, "betas": (0.9, 0.99)}}
    sampling_options = frozenset({"steps", "mid_sigma"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(ConsistencyOptions):
        """Options of sCM."""

        path: PathSource = "teacher"
        """Source of the path's direction: distillation (sCD), or training on data alone (sCT)."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.path == "data" and self.guidance_scale != 1:
                raise ValueError(f"guidance_scale: expected 1 with path 'data', got {self.guidance_scale}")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return angle_sampler(config.steps, family.schedule, config.mid_sigma)

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        check_derivative(config, family)

    def build(self) -> None:
        self.time_weight = TimeWeight()
        self.consistency = SelfConsistency(self.teacher, self.student, self.config, self.time_weight, self.config.path)
        self.add_turn("student", self.loss, self.time_weight)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        consistency = self.consistency(batch.x0, batch.cond, draws, self.step_in_stage)
        return Losses({"loss": consistency.loss}, consistency.metrics)
