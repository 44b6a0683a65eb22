r"""Improved distribution matching distillation (Yin et al. 2024, arXiv 2405.14867).

DMD (:mod:`stepdistill.methods.dmd`) without its regression on pairs. Four things are new:

- *Two time scales*: the fake score is updated several times for every update of the student, so that it stays accurate.
  This replaces the regression (Section 4.2).
- *A critic*: a head on the fake score's bottleneck tells real images from the student's, both with noise,

  .. math:: L_D = \mathrm{softplus}(-D(x_t)) + \mathrm{softplus}(D(\hat x_t)), \quad
      L_G = \mathrm{softplus}(-D(\hat x_t)),

  so that the student can become better than its teacher, whose score is not exact (Section 4.3).
- *Several steps*: the student's clean image is noised again, and is the input of the next step (Section 4.4).
- *Backward simulation*: in training too, the input of a later step is the student's own output after the steps before
  it, from pure noise and without gradient; never a noised real image (Section 4.5).

Under the adapter bank, teacher, student, fake score and critic are one network and two adapters. Only the critic needs
images.

Later papers add terms, all off by default:

- *Decoupled* (``split``, Liu et al. 2025, arXiv 2511.22677): the unguided matching and what guidance adds to it each
  have a noise level of their own, the second only levels cleaner than the student's input.
- *Diversity* (``diversity``, DP-DMD, arXiv 2602.03139): the first step is trained to land where the teacher is after
  some of its steps from the same noise, and the later steps by matching.
- *Levels above* (``levels``, not from a paper): one fake score sees the images of all steps, so what is matched is
  their mean distribution, and the last step makes up for the blur of the first. Looked at only above the noise that the
  next step adds, an image counts no more than that step sees of it.
- *Off the trajectory* (``off_trajectory``, CDM, arXiv 2605.06376): matching also at states between the sampler's.
- *Other divergences* (``divergence``, Xu et al. 2025, arXiv 2502.15681): the gradient is weighted by what the critic
  thinks of the noised image.
- *Dynamic renoising* (``dynamic_renoise``, DMDR, arXiv 2511.13649): images are compared at high noise first. With
  adapters the teacher may also lean towards the fake score for as long (``teacher_adapter``), by a share of its adapter
  that falls to 0, and that adapter may count more than once (``fake_scale``).
- *Alignment* (``alignment``, IDA of SenseFlow, arXiv 2506.00523): the fake score moves towards the student when that
  has moved.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler, Visit
from stepdistill.discriminators.bottleneck import BottleneckCritic
from stepdistill.families.base import Family
from stepdistill.files import ranges
from stepdistill.losses import distribution_matching as dm
from stepdistill.losses import levels, student_inputs
from stepdistill.methods.base import Distiller, Losses, last_of
from stepdistill.randomness import Draws


class DMD2(Distiller):
    """A student of one or a few steps, a fake score that follows it closely, and a critic on the fake score."""

    turn_names = ("student", "fake")
    serves_as_dmd2 = True
    heads: ClassVar = {"head": "fake"}
    # the rate is that for Stable Diffusion 1.5 at first; later, and for SDXL, it is 5e-7, for ImageNet 2e-6
    optim_defaults: ClassVar = {turn: {"lr": 1e-5, "weight_decay": 0.01, "clip": 10.0} for turn in turn_names}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of improved distribution matching distillation."""

        steps: ranges.PositiveInt = 4
        """Sampling steps of the finished student."""
        guidance_scale: ranges.GuidanceScale = 1.0
        """Guidance of the teacher whose distribution is matched; 1 is none."""
        student_update_interval: ranges.PositiveInt = 5
        """The student is updated on every n-th step; the paper has 5, and 10 for Stable Diffusion."""
        fake_warmup: ranges.NonNegativeInt = 0
        """Training steps of the fake score alone, before the student's first: for starts that are no teacher."""
        fake_update: Literal["both", "alternate"] = "both"
        """On the student's steps the fake score is updated too (the paper's code), or not (NVIDIA's FastGen)."""
        gan_weight: ranges.NonNegativeFloat = 3e-3
        """Weight of the adversarial loss of the student; at 0 there is no critic."""
        critic_weight: ranges.PositiveFloat = 1e-2
        """Weight of the critic's loss, relative to the fake score's."""
        first_time: ranges.PositiveShare = 1.0
        """Time the first step is told, though its input is pure noise; 0.4 (timestep 399) for one step of SDXL."""
        divisor_floor: ranges.PositiveFloat = dm.SMALLEST_DIVISOR
        """Least value of the gradient's divisor; 0.1 in CDM."""
        guidance_rescale: dm.Rescale = "none"
        """Whether the guided velocity keeps the conditional one's norm, by token or over the image (Qwen-Image)."""
        split: bool = False
        """Whether matching and guidance are terms with noise levels of their own (Decoupled DMD)."""
        augmentation_levels: Literal["below", "full"] = "below"
        """Where the guidance term is evaluated: at levels cleaner than the student's input, or at all."""
        levels: Literal["full", "above"] = "full"
        """Where scores look at the image of a step: at all levels, or above the one that the next step begins at."""
        dynamic_renoise: ranges.NonNegativeInt = 0
        """Training steps over which levels go from mostly noise to uniform (10,000 in DMDR); 0: always uniform."""
        teacher_adapter: ranges.NonNegativeFloat = 0.0
        """With adapters: how often the fake score's counts in the teacher at first (0.75 in DMDR); it falls to 0 over
        ``dynamic_renoise``."""
        fake_scale: ranges.PositiveFloat = 1.0
        """With adapters: how often it counts in the fake score itself, in training and in use (2 in DMDR)."""
        divergence: dm.Divergence = "reverse_kl"
        """What is minimised; all but reverse KL weight the gradient by the critic's density ratio."""
        diversity: ranges.NonNegativeFloat = 0.0
        """Weight of the first step's own loss (0.05 in DP-DMD); matching then trains the other steps alone."""
        anchor: ranges.PositiveInt = 10
        """Steps of the teacher to where the first step is to land; best at the time of the student's second step."""
        anchor_steps: ranges.PositiveInt = 30
        """Steps of the teacher from noise to data, of which it takes ``anchor``."""
        off_trajectory: ranges.NonNegativeFloat = 0.0
        """Weight of matching at states off the sampler's grid (1 in CDM)."""
        random_steps: ranges.NonNegativeInt = 0
        """Train on random grids of 1 to n steps (28 in CDM); at 0 on the sampler's own grid."""
        alignment: ranges.Share = 1.0
        """How much of itself the fake score keeps after a step of the student (0.97 in LightX2V); 1 is all."""

        def __post_init__(self) -> None:
            if self.fake_update == "alternate" and self.student_update_interval == 1:
                raise ValueError(
                    "student_update_interval: expected at least 2 with fake_update 'alternate', or the fake score has "
                    "no step, got 1"
                )
            if self.augmentation_levels != "below" and not (self.split and self.guidance_scale != 1):
                raise ValueError(
                    "augmentation_levels: expected 'below' without split or without guidance, got "
                    f"{self.augmentation_levels!r}"
                )
            if self.guidance_rescale != "none" and self.guidance_scale == 1:
                raise ValueError(
                    f"guidance_rescale: expected 'none' without guidance (guidance_scale 1), got "
                    f"{self.guidance_rescale!r}"
                )
            if self.levels == "above" and (self.split or self.dynamic_renoise):
                raise ValueError(
                    "levels: expected 'full' with split or dynamic_renoise, which have others, got 'above'"
                )
            if self.levels == "above" and self.off_trajectory:
                raise ValueError("levels: expected 'full' with off_trajectory, where no step ends, got 'above'")
            if self.divergence != "reverse_kl" and not self.gan_weight:
                raise ValueError(f"gan_weight: expected above 0 with divergence {self.divergence!r}, got 0")
            if self.first_time != 1 and (self.diversity or self.random_steps):
                raise ValueError(f"first_time: expected 1 with diversity or random_steps, got {self.first_time}")
            if self.diversity and 1 in (self.steps, self.random_steps):
                raise ValueError(
                    f"diversity: expected 0 with one step, which would be left without matching, got {self.diversity}"
                )
            if self.teacher_adapter and not self.dynamic_renoise:
                raise ValueError("dynamic_renoise: expected above 0 with teacher_adapter, which falls over it, got 0")
            if self.alignment != 1 and self.fake_scale != 1:
                raise ValueError(
                    f"fake_scale: expected 1 with alignment, because the student's counts once, got {self.fake_scale}"
                )
            if self.anchor > self.anchor_steps:
                raise ValueError(f"anchor: expected at most anchor_steps = {self.anchor_steps}, got {self.anchor}")
            defaults = type(self)
            if not self.gan_weight and self.critic_weight != defaults.critic_weight:
                raise ValueError(
                    f"critic_weight: expected {defaults.critic_weight} without gan_weight, got {self.critic_weight}"
                )
            if not self.diversity and (self.anchor, self.anchor_steps) != (defaults.anchor, defaults.anchor_steps):
                raise ValueError("diversity: expected above 0 with anchor or anchor_steps, got 0")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        grid = family.schedule.renoising_grid(config.steps)
        times = student_inputs.begun_at(family.schedule, grid, config.first_time)
        return ConsistencySampler(family.schedule, times)

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        super().check(config, family)
        if config.diversity:
            student_inputs.check_landing(family.schedule, config.anchor_steps)

    @classmethod
    def trains_on_images(cls, config: Config) -> bool:
        return config.gan_weight > 0

    def build(self) -> None:
        self.fake = self.add_role("fake")
        self.keep_near_student("fake", self.fake_keeps)
        scale, rescale, floor = self.config.guidance_scale, self.config.guidance_rescale, self.config.divisor_floor
        real = self.teacher
        if self.config.teacher_adapter or self.config.fake_scale != 1:
            self.bank.scale("fake", self.config.fake_scale)  # also by 1: full copies are refused
        if self.config.teacher_adapter:
            real = self.fake.leaning(self.leaning)
        self.matching = dm.Matching(real, self.fake, scale, rescale=rescale, floor=floor)
        if self.config.gan_weight:
            self.conditional_critic = True
            self.critic = BottleneckCritic(self.fake)
            self.head = self.critic.head  # a module of the method, so that it is saved
        self.add_turn("student", self.student_loss, when=self.updates_student)
        head = list(self.head.parameters()) if self.config.gan_weight else []
        self.add_turn("fake", self.fake_loss, when=self.updates_fake, head=head)

    def updates_student(self, step: int) -> bool:
        """Return whether ``step`` is the last of an interval: the fake score comes first."""
        return last_of(self.config.student_update_interval, self.config.fake_warmup)(step)

    def updates_fake(self, step: int) -> bool:
        """Return True on every step, or if the turns alternate on all steps but the student's."""
        return self.config.fake_update == "both" or not self.updates_student(step)

    def leaning(self) -> float:
        """Return how often the fake score's adapter presently counts in the teacher."""
        return self.config.teacher_adapter * levels.falling(self.step_in_stage / self.config.dynamic_renoise)

    def fake_keeps(self) -> float:
        """Return how much of itself the fake score keeps after the present step."""
        return self.config.alignment if self.updates_student(self.step_in_stage) else 1.0

    # ------------------------------------------------------------------------------------------------ the turns

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        visited = self.simulate(batch, draws)
        x0 = visited[-1].prediction.x0
        terms, metrics = self.matching_terms(visited[-1], batch, draws)
        if self.config.diversity:
            terms["diversity"] = self.config.diversity * self.diversity_loss(visited[0], batch)
        if self.config.off_trajectory:
            terms["off_trajectory"] = self.config.off_trajectory * self.off_trajectory_loss(visited[-1], batch, draws)
        if self.config.gan_weight:
            terms["gan"] = self.config.gan_weight * self.critic.generator_loss(x0, batch.cond, draws)
        if batch.images is not None:
            metrics["diversity_ratio"] = student_inputs.diversity_ratio(x0, batch.images)
        return Losses(terms, metrics)

    def fake_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            visit = self.simulate(batch, draws)[-1]
        x0, is_above = visit.prediction.x0, self.config.levels == "above"
        t = levels.times_above(self.schedule, draws, visit.end) if is_above else None
        terms = {"denoising": dm.fake_score_loss(self.fake, x0, batch.cond, draws, t)}
        if not self.config.gan_weight:
            return Losses(terms)
        critic, metrics = self.critic.critic_loss(batch.x0, x0, batch.cond, draws)
        return Losses(terms | {"critic": self.config.critic_weight * critic}, metrics)

    def simulate(self, batch: Batch, draws: Draws) -> list[Visit]:
        """Return what the student sees on its way from noise to a random one of its steps."""
        start = self.schedule.initial_noise(student_inputs.unit_noise(batch, self.family, draws))
        fewest, learns_at = (2, {0}) if self.config.diversity else (1, ())
        sampler = self.sampler()
        if self.config.random_steps:
            grid = levels.random_grid(self.schedule, draws, fewest, self.config.random_steps)
            sampler = ConsistencySampler(self.schedule, grid)
        return student_inputs.simulation(
            self.student, sampler, start, batch.cond, draws, fewest=fewest, learns_at=learns_at
        )

    # ------------------------------------------------------------------------------------------------ the terms

    def matching_terms(self, visit: Visit, batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the terms of guided distribution matching of the student's images, and metrics."""
        x0, level, weigh = visit.prediction.x0, self.level(visit, draws), self.weigh(batch)
        if not self.config.split:
            loss, metrics = self.matching.guided(x0, batch.cond, draws, level, weigh)
            return {"matching": loss}, metrics
        loss, metrics = self.matching.unguided(x0, batch.cond, draws, level, weigh)
        highest = visit.t if self.config.augmentation_levels == "below" else torch.ones_like(visit.t)
        level = levels.cleaner_times(self.schedule, draws, highest, self.schedule.shift)
        return {"matching": loss} | self.matching.augmentation(x0, batch.cond, draws, level), metrics

    def level(self, visit: Visit, draws: Draws) -> Tensor:
        """Return the times (B,) at which the scores of a step's images are compared."""
        if self.config.levels == "above":
            return levels.matched_times_above(self.schedule, draws, visit.end)
        if self.config.dynamic_renoise:
            return levels.dynamic_times(self.schedule, draws, self.step_in_stage / self.config.dynamic_renoise)
        if self.config.split:
            return levels.shifted_times(self.schedule, draws)
        return levels.sample_times(self.schedule, draws, *levels.MATCHED)

    def weigh(self, batch: Batch) -> dm.Weigh | None:
        """Return the weights of another divergence than reverse KL's."""
        if self.config.divergence == "reverse_kl":
            return None
        return lambda x_t, t: dm.divergence_weight(self.critic.logits(x_t, t, batch.cond), self.config.divergence)

    def diversity_loss(self, first: Visit, batch: Batch) -> Tensor:
        """Return the squared error of the first step, which is to land where the teacher is after ``anchor`` steps."""
        teacher, steps, of = self.guided_teacher(batch.cond), self.config.anchor, self.config.anchor_steps
        return student_inputs.landing_loss(teacher, self.schedule, first, steps, of)

    def off_trajectory_loss(self, visit: Visit, batch: Batch, draws: Draws) -> Tensor:
        """Return unguided matching of the student's images at a random time on the straight line of its step."""
        s = levels.shifted_times(self.schedule, draws)
        x0 = self.student(student_inputs.off_trajectory(visit, self.schedule, s), s, batch.cond).x0
        return self.matching.unguided(x0, batch.cond, draws, levels.shifted_times(self.schedule, draws))[0]
