r"""Score identity distillation (Zhou et al. 2024, arXiv 2404.04057) of several steps and under guidance.

As in DMD2 (:mod:`stepdistill.methods.dmd2`), a teacher r and a fake score f look at the student's images x with noise.
But what is minimised is a Fisher divergence, rewritten so that no score of the student is left in it,

.. math:: L = w(t) \langle r - f, (1 - a) (r - x) + a (f - x) \rangle,

and the gradient passes through both networks, and not only around them. Fake score and student take turns, one step
each. No image is needed. Here it is in the form for large teachers:

- *Several steps* (SiD-DiT, arXiv 2509.25127): the student's input is its own output after the steps before, from pure
  noise and without gradient. Noise levels are logit-normal, the same for both turns, and w is ``1 - t`` of a flow.
  There is one fake score for the images of all steps, so what is matched is their mean distribution: the last step
  would make up for the blur of the first. An image is therefore only looked at above the noise that its next step adds
  (``levels``, not in the paper): there the fake score knows of the first steps no more than the next one sees.
- *Long and short guidance* (SiD-LSG, arXiv 2406.01561): the teacher is guided, and the fake score may be too; it is
  then trained through its guided output.
- *A critic* (SiDA, arXiv 2410.14919): a head on the fake score's bottleneck tells real images from the student's. It
  needs real images, and only helps where these are better than the teacher's.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import DDIM, ConsistencySampler, Sampler
from stepdistill.discriminators.bottleneck import BottleneckCritic
from stepdistill.families.base import Family
from stepdistill.files import ranges
from stepdistill.files.schema import refuse_unread
from stepdistill.losses import score_identity as identity
from stepdistill.losses.distribution_matching import diagnostics
from stepdistill.losses.levels import MATCHED, log_normal_times_above
from stepdistill.losses.student_inputs import begun_at, diversity_ratio, simulation, unit_noise
from stepdistill.methods.base import Distiller, Losses, last_of
from stepdistill.randomness import Draws


class SiD(Distiller):
    """A student of one or a few steps, a fake score and, with real images, a critic on the fake score."""

    turn_names = ("fake", "student")
    heads: ClassVar = {"head": "fake"}
    optim_defaults: ClassVar = {turn: {"lr": 5e-6, "betas": (0.0, 0.999)} for turn in turn_names}
    needs_images = False

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of score identity distillation."""

        steps: ranges.PositiveInt = 4
        """Sampling steps of the finished student."""
        guidance_scale: ranges.GuidanceScale = 1.0
        """Guidance of the teacher; 1 is none, and 4.5 the paper's for text."""
        fake_guidance_scale: ranges.GuidanceScale = 1.0
        """Guidance under which the fake score is trained and read; 4.5 in the paper, 1 is none."""
        alpha: ranges.NonNegativeFloat = 1.0
        """a of the loss; 1.2 in the first paper."""
        weight: identity.IdentityWeight = "linear"
        """w of the loss: 1 - t of a flow, or one over the teacher's mean error (the first paper)."""
        location: ranges.FiniteFloat = 0.7
        """Mean of the logit of a flow's time at which the networks look at images; larger is noisier."""
        scale: ranges.PositiveFloat = 1.6
        """Its standard deviation."""
        levels: Literal["above", "full"] = "above"
        """Where a step's image is looked at: above the noise level that the next step begins at, or at all (the paper);
        the same for one step."""
        noise: Literal["fresh", "ddim"] = "fresh"
        """Whether a step noises the student's image afresh, or keeps the noise that it found."""
        first_time: ranges.PositiveShare = 1.0
        """Time the first step is told, though its input is pure noise; 0.625 in SiD-LSG for Stable Diffusion 1.5."""
        student_update_interval: ranges.PositiveInt = 1
        """The student is updated on every n-th step, the fake score on each."""
        fake_warmup: ranges.NonNegativeInt = 0
        """Training steps of the fake score alone, before the student's first."""
        gan_weight: ranges.NonNegativeFloat = 0.0
        """Weight of the student's adversarial loss; at 0 there is no critic, and no image is needed."""
        gan_start: ranges.NonNegativeInt = 0
        """Training steps before the adversarial loss joins; the critic learns from the first on."""
        critic_weight: ranges.PositiveFloat = 1e-2
        """Weight of the critic's loss, relative to the fake score's."""

        def __post_init__(self) -> None:
            if self.gan_start and not self.gan_weight:
                raise ValueError(f"gan_weight: expected above 0 with gan_start = {self.gan_start}, got 0")
            refuse_unread(self, ["critic_weight"], not self.gan_weight, "without gan_weight")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        schedule = family.schedule
        if config.noise == "ddim":
            return DDIM(schedule, begun_at(schedule, schedule.student_grid(config.steps), config.first_time))
        times = begun_at(schedule, schedule.renoising_grid(config.steps), config.first_time)
        return ConsistencySampler(schedule, times)

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        family.check_guidance(config.fake_guidance_scale)

    @classmethod
    def trains_on_images(cls, config: Config) -> bool:
        return config.gan_weight > 0

    def build(self) -> None:
        config = self.config
        self.fake = self.add_role("fake")
        if config.gan_weight:
            self.conditional_critic = True
            self.critic = BottleneckCritic(self.fake)
            self.head = self.critic.head  # a module of the method, so that it is saved
        head = list(self.head.parameters()) if config.gan_weight else []
        self.add_turn("fake", self.fake_loss, head=head)
        self.add_turn("student", self.student_loss, when=last_of(config.student_update_interval, config.fake_warmup))

    def generate(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return the student's clean images (B, ...) at a random step of its way from noise, and times (B,) to look at.

        The times are logit-normal, those of a flow.
        """
        sampler, start = self.sampler(), self.schedule.initial_noise(unit_noise(batch, self.family, draws))
        visited = simulation(self.student, sampler, start, batch.cond, draws)
        end = sampler.times[len(visited)].item() if self.config.levels == "above" else 0.0
        t = log_normal_times_above(self.schedule, draws, self.config.location, self.config.scale, end)
        return visited[-1].prediction.x0, t.clamp(max=MATCHED[1])

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        config, (x0, t) = self.config, self.generate(batch, draws)
        x = identity.shielded(x0)
        x_t = self.schedule.add_noise(x, draws.normal_like(x), t)
        real = self.guided_teacher(batch.cond)(x_t, t).x0
        fake = self.fake.guided(batch.cond, config.fake_guidance_scale - 1)(x_t, t).x0
        weight = identity.identity_weight(config.weight, self.schedule, t, x, real)
        error = weight * identity.identity_error(x, real, fake, config.alpha)
        terms = {"identity": identity.over_finite(error)}
        if config.gan_weight and self.step_in_stage >= config.gan_start:
            terms["gan"] = config.gan_weight * self.critic.generator_loss(x0, batch.cond, draws)
        metrics = diagnostics(x0, real, fake, t) | {"excluded": 1 - error.isfinite().float().mean()}
        if batch.images is not None:
            metrics["diversity_ratio"] = diversity_ratio(x0, batch.images)
        return Losses(terms, metrics)

    def fake_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            x0, t = self.generate(batch, draws)
        w = self.config.fake_guidance_scale - 1
        error = identity.guided_denoising_loss(self.fake, w, x0, draws.normal_like(x0), t, batch.cond)
        terms = {"denoising": error.mean()}
        if not self.config.gan_weight:
            return Losses(terms)
        critic, metrics = self.critic.critic_loss(batch.x0, x0, batch.cond, draws)
        return Losses(terms | {"critic": self.config.critic_weight * critic}, metrics)
