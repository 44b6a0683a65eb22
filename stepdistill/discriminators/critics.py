"""Critics: modules that tell real images from a student's, on the features of a frozen network.

Every critic is called with clean images, their conditions, and a *view* that real and generated images share, and
returns logits. There are two:

- :class:`CleanCritic` sees clean images through a frozen feature network (ADD), with projections of the condition and
  of the embedding of the image that was noised for the student;
- :class:`RenoisedCritic` noises the images again and sees them through the teacher itself (LADD, Sauer et al. 2024,
  arXiv 2403.12015). High noise shows structure and low noise texture, and latents need no decoding.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.schedule import expand
from stepdistill.discriminators.conditioning import condition_vector
from stepdistill.discriminators.feature_sources import MAX_BLOCKS, FeatureSource, spaced_features
from stepdistill.discriminators.heads import Heads
from stepdistill.families.base import Family
from stepdistill.features.base import FeatureExtractor
from stepdistill.losses.adversarial import (
    AdversarialLoss,
    Logits,
    approximate_r1,
    critic_loss,
    critic_metrics,
    generator_loss,
    r1_penalty,
)
from stepdistill.losses.levels import log_normal_times
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

Conditioning = Literal["none", "condition", "both"]

TIME_WAVES = 4
"""Cosines of the time that the heads are conditioned on."""


class Critic(nn.Module, abc.ABC):
    """Heads on frozen features, and the losses of both sides.

    Args:
        heads: the trained part.
        loss: the adversarial loss.
        r1_weight: weight of the R1 penalty in the critic's loss; at 0 it is not computed.
    """

    conditional: bool
    """Whether the logits depend on the condition of an image."""

    def __init__(self, heads: Heads, loss: AdversarialLoss, r1_weight: float) -> None:
        super().__init__()
        self.heads = heads
        self.loss = loss
        self.r1_weight = r1_weight

    def see(self, x0: Tensor) -> Tensor:
        """Return what is judged of clean images (B, ...): these themselves, or decoded."""
        return x0

    @abc.abstractmethod
    def view(self, batch: Batch, real: Callable[[], Tensor], t: Tensor, draws: Draws) -> Tensor:
        """Return what real and generated images are judged under.

        Args:
            batch: real images and their conditions.
            real: returns what is seen of the real images.
            t: times (B,) of the student's input.
            draws: source of noise levels.
        """

    @abc.abstractmethod
    def extract(self, seen: Tensor, cond: Cond, view: Tensor, draws: Draws) -> list[Tensor]:
        """Return the features of what is seen of clean images (B, ...)."""

    @abc.abstractmethod
    def logits(self, features: list[Tensor], cond: Cond, view: Tensor) -> Logits:
        """Return the logits of features."""

    @abc.abstractmethod
    def r1(self, seen: Tensor, features: list[Tensor], cond: Cond, view: Tensor, draws: Draws) -> Tensor:
        """Return the R1 penalty at what is seen of real images (B, ...), and at the features that were judged."""

    def forward(self, seen: Tensor, cond: Cond, view: Tensor, draws: Draws) -> Logits:
        """Return the logits of what is seen of clean images (B, ...)."""
        return self.logits(self.extract(seen, cond, view, draws), cond, view)

    def feature_networks(self) -> dict[str, FeatureExtractor]:
        """Return the feature network by its configuration key, unless it is the teacher."""
        return {}

    def student_loss(self, seen: Tensor, batch: Batch, t: Tensor, draws: Draws) -> Tensor:
        """Return the adversarial loss of what is seen of a student's images, whose input was at times ``t`` (B,)."""
        view = self.view(batch, lambda: self.see(batch.x0), t, draws)
        return generator_loss(self(seen, batch.cond, view, draws), self.loss)

    def critic_loss(
        self, x0: Tensor, batch: Batch, t: Tensor, draws: Draws
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the critic's loss terms and metrics, on the real images of a batch and a student's ``x0``."""
        seen = self.see(batch.x0)
        view = self.view(batch, lambda: seen, t, draws)
        features = self.extract(seen, batch.cond, view, draws)
        real = self.logits(features, batch.cond, view)
        fake = self(self.see(x0), batch.cond, view, draws)
        terms = {"loss": critic_loss(real, fake, self.loss)}
        if self.r1_weight:
            terms["r1"] = self.r1_weight * self.r1(seen, features, batch.cond, view, draws)
        return terms, critic_metrics(real, fake)


class CleanCritic(Critic):
    """Heads on the features of clean images. A view is the vector that is projected.

    Args:
        family: the teacher's family.
        features: the frozen features.
        conditioning: what is projected: nothing, the condition, or also the embedding of the image that was noised.
        loss: the adversarial loss.
        r1_weight: weight of R1 on the features of real images.
    """

    def __init__(
        self,
        family: Family,
        features: FeatureSource,
        conditioning: Conditioning,
        *,
        loss: AdversarialLoss = "hinge",
        r1_weight: float = 0.0,
    ) -> None:
        known = condition_vector(family.example_cond([0]), 1, family.num_classes).shape[1]
        sizes = {"none": 0, "condition": 1 + known, "both": 1 + known + features.num_embedded}
        super().__init__(Heads(features.shapes, sizes[conditioning]), loss, r1_weight)
        self.features = features
        self.conditioning = conditioning
        self.conditional = conditioning != "none"
        self.num_classes = family.num_classes

    def see(self, x0: Tensor) -> Tensor:
        return self.features.see(x0)

    def condition(self, cond: Cond, real: Callable[[], Tensor], t: Tensor) -> Tensor:
        """Return the projected vector (B, d), where the student's input was the real image, noised to times ``t`` (B,).

        At t = 1 the input contains nothing of the image, and the embedding is zero for real and generated images alike.
        The vector starts with a 1: the projection of a zero vector would be a zero logit.
        """
        if self.conditioning == "none":
            return torch.zeros(len(t), 0, device=t.device)
        given = condition_vector(cond, len(t), self.num_classes).to(t.device)
        vector = torch.cat([given.new_ones(len(t), 1), given], 1)
        if self.conditioning == "condition":
            return vector
        embedded = normalize(self.features.embed(real(), cond), dim=1)
        return torch.cat([vector, expand(t < 1, embedded) * embedded], 1)

    def view(self, batch: Batch, real: Callable[[], Tensor], t: Tensor, draws: Draws) -> Tensor:
        del draws
        return self.condition(batch.cond, real, t)

    def extract(self, seen: Tensor, cond: Cond, view: Tensor, draws: Draws) -> list[Tensor]:
        del view
        return self.features.extract(seen, cond, draws)

    def logits(self, features: list[Tensor], cond: Cond, view: Tensor) -> Logits:
        del cond
        return self.heads(features, view)

    def r1(self, seen: Tensor, features: list[Tensor], cond: Cond, view: Tensor, draws: Draws) -> Tensor:
        del seen, cond, draws
        return r1_penalty(lambda leaves: self.heads(leaves, view), features)

    def feature_networks(self) -> dict[str, FeatureExtractor]:
        return self.features.networks()


class RenoisedCritic(Critic):
    """Heads on the teacher's features of images that are noised again. A view is the times (B,) they are noised to.

    Args:
        teacher: the network whose features are used, and whose schedule noises.
        location: mean of the logit-normal noise levels ``sigmoid(location + scale n)`` in a flow's time; larger is
            noisier.
        scale: their standard deviation, in logits.
        loss: the adversarial loss.
        r1_weight: weight of the approximate R1 penalty.
        r1_distance: distance of its finite difference, in standard deviations of noise on a real image.
        max_blocks: most blocks of the teacher with a head.
    """

    conditional = True

    def __init__(
        self,
        teacher: Denoiser,
        location: float,
        scale: float,
        *,
        loss: AdversarialLoss = "hinge",
        r1_weight: float = 0.0,
        r1_distance: float = 0.1,
        max_blocks: int = MAX_BLOCKS,
    ) -> None:
        blocks, shapes = spaced_features(teacher, max_blocks)
        example = condition_vector(teacher.family.example_cond([0]), 1, teacher.family.num_classes)
        super().__init__(Heads(shapes, example.shape[1] + TIME_WAVES), loss, r1_weight)
        self.blocks = blocks
        self.schedule = teacher.schedule
        self.num_classes = teacher.family.num_classes
        self.location, self.scale = location, scale
        self.r1_distance = r1_distance

    def view(self, batch: Batch, real: Callable[[], Tensor], t: Tensor, draws: Draws) -> Tensor:
        del batch, real, t
        return self.sample_times(draws)

    def sample_times(self, draws: Draws) -> Tensor:
        """Return times (B,) whose signal-to-noise ratio is that of a flow at logit-normal times."""
        times = log_normal_times(self.schedule, draws, self.location, self.scale)
        return times.clamp(self.schedule.lowest_time, 1.0)

    def extract(self, seen: Tensor, cond: Cond, view: Tensor, draws: Draws) -> list[Tensor]:
        return self.blocks(self.schedule.add_noise(seen, draws.normal_like(seen), view), view, cond)

    def logits(self, features: list[Tensor], cond: Cond, view: Tensor) -> Logits:
        return self.heads(features, self.condition(cond, view))

    def r1(self, seen: Tensor, features: list[Tensor], cond: Cond, view: Tensor, draws: Draws) -> Tensor:
        """Return the approximate R1 penalty at real images, which Gaussian noise moves in image space."""
        del features
        noise, direction = draws.normal_like(seen), draws.normal_like(seen)
        x_t = self.schedule.add_noise(seen, noise, view)
        near = self.schedule.add_noise(seen + self.r1_distance * direction, noise, view)
        vector = self.condition(cond, view)
        features, moved = self.blocks(x_t, view, cond), self.blocks(near, view, cond)
        return approximate_r1(lambda maps: self.heads(maps, vector), features, moved, self.r1_distance)

    def condition(self, cond: Cond, t: Tensor) -> Tensor:
        """Return the condition and the time as a vector (B, d)."""
        vector = condition_vector(cond, len(t), self.num_classes).to(t.device)
        waves = torch.stack([(k * math.pi * t).cos() for k in range(TIME_WAVES)], 1)
        return torch.cat([vector, waves.to(vector.dtype)], 1)
