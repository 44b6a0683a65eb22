r"""Imagine Flash: backward distillation, shifted reconstruction, noise correction (Kohler et al. 2024, 2405.05224).

*Backward distillation*: what the student is shown at a time t is never a noised image but the end of its own rollout
from pure noise down to t, by the sampler it will be used with. Nothing of a real image leaks into training, and
training and use see the same inputs.

*Shifted reconstruction*: its clean image ``x`` is noised again, to ``gamma(t)``, and the guided teacher walks k DDIM
steps down from there; where it arrives is the target,

.. math:: \| \hat x_\Phi(f^k_\Phi(\alpha_\gamma x + \sigma_\gamma \epsilon)) - x \|^2, \qquad \gamma(t) = g\, t^p.

Early steps are thus taught structure, late ones detail. The paper's gamma is not published; p = 1 shifts nothing, and
g < 1 leaves the teacher something of ``x`` to reconstruct at t = 1, where the target else has nothing to do with it.
``reconstruction: plain`` is backward distillation alone: the teacher walks from what the student was shown.

*Noise correction*: at pure noise, the noise in ``x_T`` is ``x_T`` itself. Networks that predict a velocity or the clean
image at zero terminal SNR, and flows, say so of themselves; others go by
:class:`~stepdistill.diffusion.samplers.NoiseCorrected`.

The critic, of which the paper's text tells little, is LADD's, heads on the teacher's features of re-noised images, or
ADD's, heads on what a feature network sees in clean ones (``features``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.ode import ode_step
from stepdistill.diffusion.samplers import DDIM, NoiseCorrected, Sampler
from stepdistill.diffusion.schedule import DiscreteVP
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.discriminators.conditioning import check_classes
from stepdistill.discriminators.critics import CleanCritic, RenoisedCritic
from stepdistill.discriminators.feature_sources import open_feature_source
from stepdistill.families.base import Family
from stepdistill.features.base import FeatureExtractor
from stepdistill.losses.adversarial import AdversarialLoss, critic_loss, critic_metrics, generator_loss
from stepdistill.losses.regression import mean_square
from stepdistill.losses.student_inputs import backward_simulation, check_first_step, diversity_ratio
from stepdistill.methods.base import Distiller, Losses, Turn
from stepdistill.randomness import Draws

NO_SIGNAL = 1e-3
"""An alpha_T below it: what networks of velocities or clean images take for the noise in pure noise is that itself."""


class ImagineFlash(Distiller):
    """A student that learns on its own rollouts, and a critic on its teacher's features."""

    turn_names = ("student", "critic")
    optim_defaults: ClassVar = {"critic": {"betas": (0.0, 0.99)}}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of Imagine Flash."""

        steps: int = 3
        """Network calls of the finished student, 1 to 3 in the paper."""
        teacher_steps: int = 4
        """k, the DDIM steps of the teacher to a target."""
        guidance_scale: float = 1.0
        """Guidance of the teacher, baked into the student; 1 is none."""
        reconstruction: Literal["shifted", "plain"] = "shifted"
        """Where the teacher starts: at the student's answer noised again to gamma, or at what the student was shown."""
        shift_power: float = 2.0
        """p of gamma."""
        shift_top: float = 0.95
        """g of gamma, the noisiest time a teacher starts from."""
        adversarial_weight: float = 0.1
        """What a logit counts for against the squared error; 0 is no critic's word."""
        adversarial: AdversarialLoss = "hinge"
        features: str = "teacher"
        """What the critic sees through: the ``teacher``, or a feature network that is not the judge."""
        augment: bool = True
        """Whether a feature network sees augmented images (DiffAugment)."""
        location: float = 0.0
        """Of the logit-normal noise levels at which a critic on the teacher looks."""
        scale: float = 1.0
        """Of the logit-normal noise levels at which a critic on the teacher looks."""

        def __post_init__(self) -> None:
            if min(self.steps, self.teacher_steps) < 1:
                raise ValueError(f"wanted steps, teacher_steps >= 1; found {self.steps}, {self.teacher_steps}")
            if not (0 < self.shift_top <= 1 and self.shift_power > 0):
                raise ValueError(
                    f"wanted 0 < shift_top <= 1 and shift_power > 0; found {self.shift_top}, {self.shift_power}"
                )
            if not (self.adversarial_weight >= 0 and self.scale > 0):
                raise ValueError(
                    f"wanted adversarial_weight >= 0, scale > 0; found {self.adversarial_weight}, {self.scale}"
                )

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        check_first_step(family)
        family.check_guidance(config.guidance_scale)
        to_diffusers(own_sampler(family, config.steps), family.scheduler_config)

    def build(self) -> Sequence[Turn]:
        self.critic = self.make_critic()
        return [
            Turn("student", self.bank.params("student"), self.student_loss),
            Turn("critic", list(self.critic.heads.parameters()), self.critic_loss),
        ]

    def make_critic(self) -> CleanCritic | RenoisedCritic:
        """Heads on what ``features`` names; a student of noise alone has no image that a critic could be told of."""
        if self.config.features == "teacher":
            return RenoisedCritic(self.teacher, self.config.location, self.config.scale)
        eyes = open_feature_source(self.config.features, self.family, self.teacher, augment=self.config.augment)
        return CleanCritic(self.family, eyes, "condition")

    def feature_networks(self) -> dict[str, FeatureExtractor]:
        return self.critic.eyes.networks() if isinstance(self.critic, CleanCritic) else {}

    def sampler(self) -> Sampler:
        return own_sampler(self.family, self.config.steps)

    def generate(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Backward distillation: the student's clean images (B, ...) of states (B, ...) of its own, at times (B,)."""
        x_t, t = backward_simulation(self.student, self.sampler(), batch, draws)
        return self.student(x_t, t, batch.cond).x0, x_t, t

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x0, x_t, t = self.generate(batch, draws)
        with torch.no_grad():
            target = self.target(*self.start(x0.detach(), x_t, t, draws.normal_like(x0)), batch.cond)
        logits = self.critic(x0, batch.cond, self.critic.view(batch, draws), draws)
        terms = {
            "reconstruction": mean_square(x0, target).mean(),
            "adversarial": self.config.adversarial_weight * generator_loss(logits, self.config.adversarial),
        }
        return Losses(terms, {"diversity_ratio": diversity_ratio(x0, batch.x0)})

    def critic_loss(self, batch: Batch, draws: Draws) -> Losses:
        if self.step_in_stage == 0:
            check_classes(batch.cond, self.family.num_classes)
        with torch.no_grad():
            x0, *_ = self.generate(batch, draws)
        view = self.critic.view(batch, draws)
        real, fake = (self.critic(x, batch.cond, view, draws) for x in (batch.x0, x0))
        return Losses({"loss": critic_loss(real, fake, self.config.adversarial)}, critic_metrics(real, fake))

    def gamma(self, t: Tensor) -> Tensor:
        """Where the teacher starts that teaches the student at ``t``, (B,)."""
        return self.config.shift_top * t**self.config.shift_power

    def start(self, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """State (B, ...) and times (B,) that the teacher walks down from, of a student that saw ``x0`` in ``x_t``."""
        if self.config.reconstruction == "plain":
            return x_t, t
        start = self.gamma(t)
        return self.schedule.add_noise(x0, noise, start), start

    def target(self, x: Tensor, start: Tensor, cond: Cond) -> Tensor:
        """The clean image (B, ...) that k steps of the teacher make of states (B, ...) at times (B,)."""
        teacher = self.teacher.guided(cond, self.config.guidance_scale - 1)
        k = self.config.teacher_steps
        for i in range(k, 1, -1):
            x = ode_step(teacher(x, start * i / k), self.schedule, start * (i - 1) / k)
        return teacher(x, start / k).x0


def own_sampler(family: Family, steps: int) -> Sampler:
    """DDIM, noise-corrected at the first step where the network does not do so of itself.

    The corrected sampler's own scheduler also takes numbers of steps that stock DDIM cannot, such as 3 of 1000.
    """
    schedule, grid = family.schedule, family.schedule.grid(steps)
    alpha_1, _ = schedule(torch.ones(1))
    knows = steps == 1 or (family.prediction_type not in ("epsilon", "edm") and alpha_1.item() < NO_SIGNAL)
    stock = not isinstance(schedule, DiscreteVP) or schedule.num_timesteps % steps == 0
    return (DDIM if knows and stock else NoiseCorrected)(schedule, grid)
