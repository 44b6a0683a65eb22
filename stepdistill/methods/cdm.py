r"""Distribution matching on random schedules and off the trajectory (CDM, arXiv 2605.06376).

Like DMD2 (:mod:`stepdistill.methods.dmd2`), the student is trained on its own way from noise, by the difference of a
teacher's and a fake score. But that way is deterministic, and its times are drawn afresh in every step, so that one
student serves any number of steps. Its images are compared by three terms, each at a noise level of its own:

- *Augmentation*: what guidance adds to the teacher's score, at a level cleaner than the student's input;
- *Matching* of the unguided score, at any level;
- *Off the trajectory*: the same, for the student's images at a state on the straight continuation of its step,
  ``x_s = alpha_s x_0 + sigma_s eps``, at any time s. There it also corrects what its own steps skip.

With ``c`` and ``u`` the conditional and the unconditional denoising of the teacher and ``f`` that of the fake score,

.. math:: L = \|x - \mathrm{sg}(x + (g - 1) \tfrac{c - u}{m})\|^2 + \|x - \mathrm{sg}(x + \tfrac{c - f}{m})\|^2
    + \|x' - \mathrm{sg}(x' + \tfrac{c - f}{m})\|^2, \qquad m = \max(\mathrm{mean}|x - c|, 0.1).

Without DMD's half, gradients are twice as long. The fake score is updated in every step, and then moves a little
towards the student (IDA, SenseFlow, arXiv 2506.00523). No image is needed.

Under ``levels: above`` (not in the paper) the images of a step are looked at only above the noise at which the next one
begins, as in :mod:`stepdistill.methods.dmd2`: one fake score sees the images of all steps, and the last step would make
up for the blur of the first.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import DDIM, Sampler, Visit
from stepdistill.families.base import Family
from stepdistill.files.ranges import GuidanceScale, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share
from stepdistill.files.schema import refuse_unread
from stepdistill.losses.distribution_matching import Matching, fake_score_loss
from stepdistill.losses.levels import (
    MATCHED,
    cleaner_times,
    matched_times_above,
    random_grid,
    sample_times,
    times_above,
)
from stepdistill.losses.student_inputs import diversity_ratio, off_trajectory, simulation, unit_noise
from stepdistill.methods.base import Distiller, Losses, last_of
from stepdistill.randomness import Draws


class CDM(Distiller):
    """A student of any number of steps, and a fake score that follows it closely."""

    turn_names = ("student", "fake")
    serves_as_dmd2 = True
    optim_defaults: ClassVar = {
        "student": {"lr": 1e-5, "weight_decay": 1e-4, "clip": 1.0},
        "fake": {"lr": 5e-6, "weight_decay": 1e-4, "clip": 1.0},
    }
    sampling_options = frozenset({"steps"})
    needs_images = False

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of CDM."""

        steps: PositiveInt = 4
        """Sampling steps; one training serves all numbers."""
        most_steps: PositiveInt = 28
        """The random schedules of training have 1 to this many steps."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance baked into the student; 1 is none, and 8 the paper's for Stable Diffusion 3."""
        augmentation_weight: NonNegativeFloat = 1.0
        """Weight of what guidance adds."""
        matching_weight: NonNegativeFloat = 1.0
        """Weight of unguided matching at the student's steps."""
        off_trajectory_weight: NonNegativeFloat = 1.0
        """Weight of unguided matching off its steps."""
        student_update_interval: PositiveInt = 2
        """The student is updated on every n-th step, the fake score on each."""
        fake_warmup: NonNegativeInt = 0
        """Training steps of the fake score alone, before the student's first: for starts that are no teacher."""
        alignment: Share = 0.999
        """How much of itself the fake score keeps after a step, the rest being the student's; 1 is all."""
        divisor_floor: PositiveFloat = 0.1
        """Least value of the gradients' divisor m."""
        levels: Literal["full", "above"] = "full"
        """Where scores look at the image of a step: at all levels, or above the one that the next step begins at."""

        def __post_init__(self) -> None:
            refuse_unread(self, ["augmentation_weight"], self.guidance_scale == 1, "without guidance")
            augments = self.guidance_scale != 1 and self.augmentation_weight
            if not (augments or self.matching_weight or self.off_trajectory_weight):
                raise ValueError("matching_weight: expected above 0 where no other term has a weight, got 0")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return DDIM(family.schedule, family.schedule.student_grid(config.steps))

    def build(self) -> None:
        config = self.config
        self.fake = self.add_role("fake")
        self.keep_near_student("fake", lambda: config.alignment)
        self.matching = Matching(self.teacher, self.fake, config.guidance_scale, floor=config.divisor_floor)
        self.add_turn("student", self.student_loss, when=last_of(config.student_update_interval, config.fake_warmup))
        self.add_turn("fake", self.fake_loss)

    def visit(self, batch: Batch, draws: Draws) -> Visit:
        """Return a random step of the student's deterministic way from noise along a random schedule."""
        grid = random_grid(self.schedule, draws, 1, self.config.most_steps)
        start = self.schedule.initial_noise(unit_noise(batch, self.family, draws))
        return simulation(self.student, DDIM(self.schedule, grid), start, batch.cond, draws)[-1]

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        config, visit = self.config, self.visit(batch, draws)
        x0 = visit.prediction.x0
        level = cleaner_times(self.schedule, draws, visit.t)
        terms = self.matching.augmentation(x0, batch.cond, draws, level)
        terms = {name: 2 * config.augmentation_weight * term for name, term in terms.items()}
        matching, metrics = self.matching.unguided(x0, batch.cond, draws, self.level(draws, visit.end))
        terms["matching"] = 2 * config.matching_weight * matching
        s = sample_times(self.schedule, draws, *MATCHED)
        x0_off = self.student(off_trajectory(visit, self.schedule, s), s, batch.cond).x0
        level = self.level(draws, torch.minimum(s, visit.end))
        matching_off, _ = self.matching.unguided(x0_off, batch.cond, draws, level)
        terms["off_trajectory"] = 2 * config.off_trajectory_weight * matching_off
        if batch.images is not None:
            metrics["diversity_ratio"] = diversity_ratio(x0, batch.images)
        return Losses(terms, metrics)

    def level(self, draws: Draws, end: Tensor) -> Tensor:
        """Return uniform times (B,), of steps that end at times ``end`` (B,)."""
        if self.config.levels == "above":
            return matched_times_above(self.schedule, draws, end)
        return sample_times(self.schedule, draws, *MATCHED)

    def fake_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            visit = self.visit(batch, draws)
        t = times_above(self.schedule, draws, visit.end) if self.config.levels == "above" else None
        return Losses({"denoising": fake_score_loss(self.fake, visit.prediction.x0, batch.cond, draws, t)})
