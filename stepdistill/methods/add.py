r"""Adversarial diffusion distillation (Sauer et al. 2023, arXiv 2311.17042).

The input of a student of few steps is an image noised to one of its own times, and its output a clean image. Two
losses judge the output. That of a critic on frozen features makes it sharp. The other noises the output again and pulls
it to what the teacher predicts there,

.. math:: L = -\sum_k D_k(F_k(\hat x)) + \lambda\, E_{t, \epsilon}\, c(t) \|\hat x - \hat x_\psi(\mathrm{sg}(\hat x_t),
    t)\|^2, \qquad \hat x_t = \alpha_t \hat x + \sigma_t \epsilon.

The weight c(t) is alpha_t ("exponential"), or it makes the gradient that of score distillation (SDS, Poole et al. 2022,
2209.14988: ``w(t) (eps_psi - eps)`` with ``w = sigma_t^2``) or of its noise-free form (NFSD, Katzir et al. 2023,
2310.17590), where ``delta_D + 7.5 delta_C`` replaces the teacher's residual.

The first time is pure noise (zero terminal SNR is enforced). There the critic is given the condition, but not the
embedding of the real image, of which the student has seen nothing.

The paper leaves three choices open: learning rates, guidance of the teacher's target (``guidance_scale``), and NFSD's
negative prompt. Without one, the null condition replaces it, and delta_D is 0 above a time of 0.2.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler
from stepdistill.diffusion.schedule import Karras, NoiseSchedule, expand
from stepdistill.discriminators.critics import CleanCritic, Conditioning
from stepdistill.discriminators.feature_sources import MAX_BLOCKS, open_feature_source
from stepdistill.families.base import MIN_ALPHA, Family
from stepdistill.features.base import FeatureExtractor
from stepdistill.files.places import Place
from stepdistill.files.ranges import GuidanceScale, NonNegativeFloat, NonNegativeInt, PositiveInt
from stepdistill.files.schema import refuse_unread
from stepdistill.losses.adversarial import AdversarialLoss
from stepdistill.losses.regression import mean_square, weighted
from stepdistill.losses.student_inputs import diversity_ratio, student_input
from stepdistill.methods.base import Distiller, Losses, last_of
from stepdistill.randomness import Draws

DistillationWeight = Literal["exponential", "sds", "nfsd"]

NFSD_SCALE = 7.5

NFSD_LATE = 0.2
"""Below this time, the unconditional prediction itself is NFSD's delta_D."""


def distillation_weight(schedule: NoiseSchedule, t: Tensor, kind: DistillationWeight) -> Tensor:
    """Return ``c(t)`` (B,), float64: alpha_t, or ``alpha_t w(t) / (2 sigma_t)`` with ``w(t) = sigma_t^2``.

    For EDM, where alpha is always 1, the exponential weight is that of the same state scaled to unit variance.
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

        steps: PositiveInt = 1
        """Sampling steps of the finished student; the paper trains on 4 times and samples with 1 to 4 of them."""
        features: Place = "teacher"
        """Features of the critic: ``teacher``, or a feature network that is not used for evaluation."""
        conditioning: Conditioning = "both"
        """Condition of the critic: nothing, the image's condition, or also the embedding of the noised image."""
        augment: bool = True
        """Whether images are augmented for a feature network (DiffAugment)."""
        adversarial: AdversarialLoss = "hinge"
        distillation: NonNegativeFloat = 2.5
        """Lambda, the weight of the teacher's loss; 0 is a plain GAN."""
        weighting: DistillationWeight = "exponential"
        negative_prompt: str = ""
        """For ``nfsd`` with a text teacher: what images should not show, for example "blurry, low quality"."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance of the teacher's prediction; 1 is none. ``nfsd`` has its own, and takes no other."""
        decoded: bool = False
        """Whether the teacher's loss compares decoded images (the paper's choice for latents)."""
        r1: NonNegativeFloat = 1e-5
        """Gamma, the weight of R1 on the features of real images."""
        max_blocks: PositiveInt = MAX_BLOCKS
        """Most blocks of the teacher that the critic has a head on, evenly spaced."""
        student_update_interval: PositiveInt = 1
        """The student is updated on every n-th step, the critic on each."""
        critic_warmup: NonNegativeInt = 50
        """Training steps of the critic alone, before the student's first: it must know the student to lead it."""

        def __post_init__(self) -> None:
            taught, own = ("weighting", "guidance_scale", "decoded"), self.features == "teacher"
            refuse_unread(self, taught, not self.distillation, "without distillation")
            refuse_unread(self, ["max_blocks"], not own, "with features that are not the teacher's")
            refuse_unread(self, ["augment"], own, "with the teacher's features")
            if self.negative_prompt and self.weighting != "nfsd":
                raise ValueError(f"negative_prompt: expected only with weighting 'nfsd', got {self.weighting!r}")
            if self.weighting == "nfsd" and self.guidance_scale != 1:
                raise ValueError(
                    f"guidance_scale: expected 1 with weighting 'nfsd', which has a scale of its own, got "
                    f"{self.guidance_scale}"
                )

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return ConsistencySampler(family.schedule, family.schedule.renoising_grid(config.steps))

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        if config.weighting == "nfsd":
            family.null_cond(family.example_cond([0]))
        if config.negative_prompt and not family.takes_text:
            raise ValueError(f"method.negative_prompt: the teacher takes no text, got {config.negative_prompt!r}")

    def build(self) -> None:
        config = self.config
        features = open_feature_source(
            config.features, self.family, self.teacher, augment=config.augment, max_blocks=config.max_blocks
        )
        self.features = features
        critic = CleanCritic(self.family, features, config.conditioning, loss=config.adversarial, r1_weight=config.r1)
        self.negative = self.family.embed([config.negative_prompt]) if config.negative_prompt else None
        self.add_turn("student", self.student_loss, when=last_of(config.student_update_interval, config.critic_warmup))
        self.critic = self.add_critic(critic, self.critic_loss)

    def feature_networks(self) -> dict[str, FeatureExtractor]:
        return self.critic.feature_networks()

    def generate(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return the student's clean images (B, ...), and the times (B,) of its inputs."""
        times = self.times(self.schedule.renoising_grid, self.config.steps, draws.device)
        t = times[draws.integers(0, self.config.steps)]
        x_t = student_input(self.schedule, batch.x0, draws.normal_like(batch.x0), t)
        return self.student(x_t, t, batch.cond).x0, t

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x0, t = self.generate(batch, draws)
        seen = self.critic.see(x0)
        terms = {"adversarial": self.critic.student_loss(seen, batch, t, draws)}
        if self.config.distillation:
            images = seen if self.features.decodes or not self.config.decoded else self.family.decode(x0)
            distillation = self.distillation_loss(x0, images, batch.cond, draws)
            terms["distillation"] = self.config.distillation * distillation
        return Losses(terms, {"diversity_ratio": diversity_ratio(x0, batch.x0)})

    def critic_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0, t = self.generate(batch, draws)
        return Losses(*self.critic.critic_loss(x0, batch, t, draws))

    def distillation_loss(self, x0: Tensor, images: Tensor, cond: Cond, draws: Draws) -> Tensor:
        """Return ``E c(t) ||x - x_psi(x_t, t)||^2`` (mean over pixels); no gradient flows through ``x_t``.

        With ``decoded``, ``x`` are the ``images`` that ``x0`` was decoded to.
        """
        t = draws.uniform(self.schedule.lowest_time, 1.0)
        noise = draws.normal_like(x0)
        with torch.no_grad():
            target = self.distillation_target(x0.detach(), noise, t, cond)
        if self.config.decoded:
            x0, target = images, self.family.decode(target)
        weight = distillation_weight(self.schedule, t, self.config.weighting)
        return weighted(weight, mean_square(x0, target))

    def distillation_target(self, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the images (B, ...) that the student's ``x0`` is pulled to."""
        x_t = self.schedule.add_noise(x0, noise, t)
        if self.config.weighting != "nfsd":
            return self.guided_teacher(cond)(x_t, t).x0
        conditional = self.teacher(x_t, t, cond).eps
        unconditional = self.teacher(x_t, t, self.family.null_cond(cond)).eps
        unwanted = unconditional if self.negative is None else self.teacher(x_t, t, self.negative_cond(cond)).eps
        domain = torch.where(expand(t < NFSD_LATE, x_t) > 0, unconditional, unconditional - unwanted)
        direction = domain + NFSD_SCALE * (conditional - unconditional)
        alpha_t, sigma_t = self.schedule.coefficients(t, x_t)
        # at pure noise alpha may vanish; the weight vanishes with it
        return x0 - sigma_t / alpha_t.clamp(min=MIN_ALPHA) * direction

    def negative_cond(self, cond: Cond) -> Cond:
        """Return the negative prompt's condition, in the shapes of ``cond``."""
        assert self.negative is not None
        return {name: self.negative[name].to(value).expand_as(value) for name, value in cond.items()}
