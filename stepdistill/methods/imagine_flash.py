r"""Imagine Flash: backward distillation, shifted reconstruction, noise correction (Kohler et al. 2024, 2405.05224).

*Backward distillation*: the student's input at a time t is never a noised image. It is the student's own output after
sampling from pure noise down to t, by the sampler it will be used with. Nothing of a real image leaks into training,
and the inputs are the same in training and in use.

*Shifted reconstruction*: the student's clean image ``x`` is noised again, to ``gamma(t)``. From there the guided
teacher takes k DDIM steps to the target,

.. math:: \| \hat x_\Phi(f^k_\Phi(\alpha_\gamma x + \sigma_\gamma \epsilon)) - x \|^2, \qquad \gamma(t) = g\, t^p.

Early steps thus learn structure, and late ones detail. The paper's gamma is not published. With p = 1 nothing is
shifted; g < 1 leaves the teacher some of ``x`` to reconstruct at t = 1, where the target would be unrelated to it.
``reconstruction: plain`` is backward distillation alone: the teacher starts from the student's input.

*Noise correction*: at pure noise, the noise in ``x_T`` is ``x_T`` itself. Flows, and networks that predict a velocity
or the clean image at zero terminal SNR, satisfy this; for all others there is
:class:`~stepdistill.diffusion.samplers.NoiseCorrected`.

The paper says little about its critic. Here it is LADD's, heads on the teacher's features of re-noised images, or
ADD's, heads on a feature network's features of clean ones (``features``).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.ode import ode_step
from stepdistill.diffusion.samplers import DDIM, NoiseCorrected, Sampler
from stepdistill.diffusion.schedule import DiscreteVP, Karras
from stepdistill.discriminators.critics import CleanCritic, Critic, RenoisedCritic
from stepdistill.discriminators.feature_sources import MAX_BLOCKS, open_feature_source
from stepdistill.families.base import MIN_ALPHA, Family
from stepdistill.features.base import FeatureExtractor
from stepdistill.files.places import Place
from stepdistill.files.ranges import (
    FiniteFloat,
    GuidanceScale,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
)
from stepdistill.files.schema import refuse_unread
from stepdistill.losses.adversarial import AdversarialLoss
from stepdistill.losses.regression import mean_square
from stepdistill.losses.student_inputs import diversity_ratio, simulation
from stepdistill.methods.base import Distiller, Losses, last_of
from stepdistill.randomness import Draws


class ImagineFlash(Distiller):
    """A student that is trained on its own samples, and a critic."""

    turn_names = ("student", "critic")
    optim_defaults: ClassVar = {"critic": {"betas": (0.0, 0.99)}}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of Imagine Flash."""

        steps: PositiveInt = 3
        """Sampling steps of the finished student, 1 to 3 in the paper."""
        teacher_steps: PositiveInt = 4
        """k, the DDIM steps of the teacher to a target."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance of the teacher, baked into the student; 1 is none."""
        reconstruction: Literal["shifted", "plain"] = "plain"
        """Where the teacher starts: at the student's image noised again to gamma, or at the student's input.

        With the gamma below, the shifted target alone made a good student worse (docs/RESULTS.md)."""
        shift_power: PositiveFloat = 2.0
        """p of gamma."""
        shift_top: PositiveShare = 0.95
        """g of gamma, the noisiest time the teacher starts from."""
        adversarial_weight: NonNegativeFloat = 0.1
        """Weight of the adversarial loss, relative to the squared error."""
        adversarial: AdversarialLoss = "hinge"
        features: Place = "teacher"
        """Features of the critic: ``teacher``, or a feature network that is not used for evaluation."""
        augment: bool = True
        """Whether images are augmented for a feature network (DiffAugment)."""
        location: FiniteFloat = 0.0
        """Mean of the logit-normal noise levels at which a critic on the teacher judges."""
        scale: PositiveFloat = 1.0
        """Standard deviation of these noise levels."""
        max_blocks: PositiveInt = MAX_BLOCKS
        """Most blocks of the teacher that the critic has a head on, evenly spaced."""
        student_update_interval: PositiveInt = 1
        """The student is updated on every n-th step, the critic on each."""
        critic_warmup: NonNegativeInt = 50
        """Training steps of the critic alone, before the student's first: it must know the student to lead it."""

        def __post_init__(self) -> None:
            shifts, plain = ("shift_power", "shift_top"), self.reconstruction == "plain"
            refuse_unread(self, shifts, plain, "without reconstruction 'shifted'")
            critics, own = ("location", "scale", "max_blocks"), self.features == "teacher"
            refuse_unread(self, critics, not own, "with features that are not the teacher's")
            refuse_unread(self, ["augment"], own, "with the teacher's features")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        """Return DDIM, noise-corrected at the first step unless the network does so by itself.

        Without signal, velocities and clean images do; EDM's noise ``(x - x_0) / sigma`` errs by a part in ``sigma``.

        The scheduler of the corrected sampler also takes numbers of steps that stock DDIM cannot, such as 3 of 1000.
        """
        schedule, steps = family.schedule, config.steps
        alpha_1, _ = schedule(torch.ones(1))
        known = family.prediction_type != "epsilon" and alpha_1.item() < MIN_ALPHA
        exact = known or isinstance(schedule, Karras)
        stock = not isinstance(schedule, DiscreteVP) or schedule.num_timesteps % steps == 0
        rule = DDIM if stock and (exact or steps == 1) else NoiseCorrected
        return rule(schedule, schedule.student_grid(steps))

    def build(self) -> None:
        config = self.config
        self.add_turn("student", self.student_loss, when=last_of(config.student_update_interval, config.critic_warmup))
        self.critic = self.add_critic(self.make_critic(), self.critic_loss)

    def make_critic(self) -> Critic:
        """Return heads on ``features``; the student's input contains no image that a critic could be given."""
        config = self.config
        if config.features == "teacher":
            return RenoisedCritic(
                self.teacher, config.location, config.scale, loss=config.adversarial, max_blocks=config.max_blocks
            )
        features = open_feature_source(config.features, self.family, self.teacher, augment=config.augment)
        return CleanCritic(self.family, features, "condition", loss=config.adversarial)

    def feature_networks(self) -> dict[str, FeatureExtractor]:
        return self.critic.feature_networks()

    def generate(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Return the student's clean images (B, ...), and its inputs (B, ...) at times (B,), from its own sampling."""
        start = self.schedule.initial_noise(draws.normal_like(batch.x0))
        visit = simulation(self.student, self.sampler(), start, batch.cond, draws)[-1]
        return visit.prediction.x0, visit.x_t, visit.t

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x0, x_t, t = self.generate(batch, draws)
        with torch.no_grad():
            start = self.start(x0.detach(), x_t, t, draws.normal_like(x0))
            target = self.reconstruction(*start, batch.cond)
        terms = {
            "reconstruction": mean_square(x0, target).mean(),
            "adversarial": self.config.adversarial_weight
            * self.critic.student_loss(self.critic.see(x0), batch, t, draws),
        }
        return Losses(terms, {"diversity_ratio": diversity_ratio(x0, batch.x0)})

    def critic_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0, _, t = self.generate(batch, draws)
        return Losses(*self.critic.critic_loss(x0, batch, t, draws))

    def gamma(self, t: Tensor) -> Tensor:
        """Return the times (B,) that the teacher starts from where the student's inputs are at ``t``."""
        return self.config.shift_top * t**self.config.shift_power

    def start(self, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's first states (B, ...) and times (B,), where the student predicts ``x0`` from ``x_t``."""
        if self.config.reconstruction == "plain":
            return x_t, t
        start = self.gamma(t)
        return self.schedule.add_noise(x0, noise, start), start

    def reconstruction(self, x: Tensor, start: Tensor, cond: Cond) -> Tensor:
        """Return the clean images (B, ...) that k steps of the teacher make of states (B, ...) at times (B,)."""
        teacher = self.guided_teacher(cond)
        k = self.config.teacher_steps
        for i in range(k, 1, -1):
            x = ode_step(teacher(x, start * i / k), self.schedule, start * (i - 1) / k)
        return teacher(x, start / k).x0
