r"""Adversarial diffusion distillation (Sauer et al. 2023, arXiv 2311.17042).

A student of few steps is shown an image noised to one of its own times, answers with a clean one, and is judged twice:
by a critic on frozen features, which makes it sharp, and by its teacher, which is shown the student's answer noised
again and whose denoising the answer is pulled to,

.. math:: L = -\sum_k D_k(F_k(\hat x)) + \lambda\, E_{t, \epsilon}\, c(t) \|\hat x - \hat x_\psi(\mathrm{sg}(\hat x_t),
    t)\|^2, \qquad \hat x_t = \alpha_t \hat x + \sigma_t \epsilon.

The weight c(t) is alpha_t ("exponential"), or what makes the gradient that of score distillation (SDS, Poole et al.
2022, 2209.14988: ``w(t) (eps_psi - eps)`` with ``w = sigma_t^2``), or of its noise-free form (NFSD, Katzir et al. 2023,
2310.17590), in which the teacher's residual gives way to ``delta_D + 7.5 delta_C``.

The first time is pure noise (zero terminal SNR is enforced). There the critic is told the condition but not the
embedding of the real image, of which the student has seen nothing.

What the paper leaves open: learning rates; guidance of the teacher's target (``guidance_scale``); NFSD's negative
prompt. Without one the null condition stands for it, and delta_D is 0 above a time of 0.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler
from stepdistill.diffusion.schedule import Karras, NoiseSchedule, expand
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.discriminators.conditioning import check_classes
from stepdistill.discriminators.critics import CleanCritic, Conditioning
from stepdistill.discriminators.feature_sources import open_feature_source
from stepdistill.families.base import Family
from stepdistill.features.base import FeatureExtractor
from stepdistill.losses.adversarial import AdversarialLoss, critic_loss, critic_metrics, generator_loss
from stepdistill.losses.regression import mean_square, weighted
from stepdistill.losses.student_inputs import check_first_step, diversity_ratio, student_input
from stepdistill.methods.base import Distiller, Losses, Turn
from stepdistill.randomness import Draws

DistillationWeight = Literal["exponential", "sds", "nfsd"]


NFSD_SCALE = 7.5


NFSD_LATE = 0.2


MIN_TIME = 1e-3


def distillation_weight(schedule: NoiseSchedule, t: Tensor, kind: DistillationWeight) -> Tensor:
    """``c(t)`` (B,), float64: alpha_t, or ``alpha_t w(t) / (2 sigma_t)`` with ``w(t) = sigma_t^2``.

    Where alpha is 1 whatever the noise (EDM), the exponential weight is that of the same state at unit variance.
    """
    alpha_t, sigma_t = schedule(t)
    if isinstance(schedule, Karras):
        alpha_t = (1 + sigma_t**2).rsqrt()
    return alpha_t if kind == "exponential" else alpha_t * sigma_t / 2


class ADD(Distiller):
    """A student, its teacher, and a critic on frozen features."""

    turn_names = ("student", "critic")
    optim_defaults: ClassVar = {"critic": {"betas": (0.0, 0.99)}}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of adversarial diffusion distillation."""

        steps: int = 1
        """Network calls of the finished student; the paper trains on 4 times and samples with 1 to 4 of them."""
        features: str = "teacher"
        """What the critic sees through: the ``teacher``, or a feature network that is not the judge."""
        conditioning: Conditioning = "both"
        """What the critic is told: nothing, the condition, or also the embedding of the image that was noised."""
        augment: bool = True
        """Whether a feature network sees augmented images (DiffAugment)."""
        adversarial: AdversarialLoss = "hinge"
        distillation: float = 2.5
        """Lambda, the weight of the teacher's part; 0 is a plain GAN."""
        weighting: DistillationWeight = "exponential"
        negative_prompt: str = ""
        """Of ``nfsd``, for teachers that take text: what images shall not be, for example "blurry, low quality"."""
        guidance_scale: float = 1.0
        """Guidance of the teacher's denoising; 1 is none."""
        decoded: bool = False
        """Whether the teacher's part compares decoded images (the paper's choice for latents)."""
        r1: float = 1e-5
        """Gamma, the weight of R1 on the features of real images."""

        def __post_init__(self) -> None:
            if self.steps < 1:
                raise ValueError(f"steps: found {self.steps}, wanted at least 1")
            if min(self.distillation, self.r1) < 0:
                raise ValueError(f"wanted distillation, r1 >= 0; found {self.distillation}, {self.r1}")
            if self.negative_prompt and self.weighting != "nfsd":
                raise ValueError(f"negative_prompt: wanted with weighting 'nfsd' alone; found {self.weighting!r}")

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        check_first_step(family)
        family.check_guidance(config.guidance_scale)
        if config.weighting == "nfsd":
            family.null_cond(family.example_cond([0]))
        if config.negative_prompt and not family.takes_text:
            raise ValueError(f"method.negative_prompt: found {config.negative_prompt!r}, but the teacher takes no text")
        to_diffusers(ConsistencySampler(family.schedule, family.schedule.grid(config.steps)), family.scheduler_config)

    def build(self) -> Sequence[Turn]:
        config = self.config
        eyes = open_feature_source(config.features, self.family, self.teacher, augment=config.augment)
        self.critic = CleanCritic(self.family, eyes, config.conditioning)
        self.negative = self.family.embed([config.negative_prompt]) if config.negative_prompt else None
        return [
            Turn("student", self.bank.params("student"), self.student_loss),
            Turn("critic", list(self.critic.heads.parameters()), self.critic_loss),
        ]

    def feature_networks(self) -> dict[str, FeatureExtractor]:
        return self.critic.eyes.networks()

    def sampler(self) -> Sampler:
        return ConsistencySampler(self.schedule, self.schedule.grid(self.config.steps))

    def generate(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """The student's clean images (B, ...), and the times (B,) it was asked at."""
        t = self.sampler().times.to(batch.x0.device)[draws.integers(0, self.config.steps)]
        x_t = student_input(self.schedule, batch.x0, draws.normal_like(batch.x0), t)
        return self.student(x_t, t, batch.cond).x0, t

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x0, t = self.generate(batch, draws)
        vector = self.critic.condition(batch.cond, batch.x0, t)
        adversarial = generator_loss(self.critic(x0, batch.cond, vector, draws), self.config.adversarial)
        distillation = self.config.distillation * self.distillation_loss(x0, batch.cond, draws)
        spread = {"diversity_ratio": diversity_ratio(x0, batch.x0)}
        return Losses({"adversarial": adversarial, "distillation": distillation}, spread)

    def critic_loss(self, batch: Batch, draws: Draws) -> Losses:
        if self.step_in_stage == 0 and self.config.conditioning != "none":
            check_classes(batch.cond, self.family.num_classes)
        with torch.no_grad():
            x0, t = self.generate(batch, draws)
        vector = self.critic.condition(batch.cond, batch.x0, t)
        real = self.critic(batch.x0, batch.cond, vector, draws)
        fake = self.critic(x0, batch.cond, vector, draws)
        terms = {"loss": critic_loss(real, fake, self.config.adversarial)}
        if self.config.r1:
            terms["r1"] = self.config.r1 * self.critic.r1(batch.x0, batch.cond, vector, draws)
        return Losses(terms, critic_metrics(real, fake))

    def distillation_loss(self, x0: Tensor, cond: Cond, draws: Draws) -> Tensor:
        """``E c(t) ||x - x_psi(x_t, t)||^2`` (mean over pixels); no gradient flows through the re-noised image."""
        t = draws.uniform(MIN_TIME, 1.0)
        noise = draws.normal_like(x0)
        with torch.no_grad():
            target = self.target(x0.detach(), noise, t, cond)
        if self.config.decoded:
            x0, target = self.family.decode(x0), self.family.decode(target)
        weight = distillation_weight(self.schedule, t, self.config.weighting)
        return weighted(weight, mean_square(x0, target))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the answer is pulled to, (B, ...)."""
        x_t = self.schedule.add_noise(x0, noise, t)
        if self.config.weighting != "nfsd":
            return self.teacher.guided(cond, self.config.guidance_scale - 1)(x_t, t).x0
        conditional = self.teacher(x_t, t, cond).eps
        unconditional = self.teacher(x_t, t, self.family.null_cond(cond)).eps
        unwanted = unconditional if self.negative is None else self.teacher(x_t, t, self.negative_cond(cond)).eps
        domain = torch.where(expand(t < NFSD_LATE, x_t) > 0, unconditional, unconditional - unwanted)
        direction = domain + NFSD_SCALE * (conditional - unconditional)
        alpha_t, sigma_t = (expand(coefficient, x_t) for coefficient in self.schedule(t))
        # at pure noise alpha may vanish; the weight vanishes with it
        return x0 - sigma_t / alpha_t.clamp(min=1e-6) * direction

    def negative_cond(self, cond: Cond) -> Cond:
        """The negative prompt's condition, of the shapes of ``cond``."""
        assert self.negative is not None
        return {name: self.negative[name].to(value).expand_as(value) for name, value in cond.items()}
