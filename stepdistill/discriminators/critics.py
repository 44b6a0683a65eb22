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
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.schedule import expand
from stepdistill.discriminators.conditioning import condition_vector
from stepdistill.discriminators.feature_sources import FeatureSource
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
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import BlockFeatures
from stepdistill.randomness import Draws

Conditioning = Literal["none", "condition", "both"]

MIN_TIME = 1e-3
"""The lowest time at which images are judged."""

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

    @abc.abstractmethod
    def view(self, batch: Batch, t: Tensor, draws: Draws) -> Tensor:
        """Return what real and generated images are judged under, where the student's input was at times ``t`` (B,)."""

    @abc.abstractmethod
    def forward(self, x0: Tensor, cond: Cond, view: Tensor, draws: Draws) -> Logits:
        """Return the logits of clean images (B, ...)."""

    @abc.abstractmethod
    def r1(self, x0: Tensor, cond: Cond, view: Tensor, draws: Draws) -> Tensor:
        """Return the R1 penalty at real images (B, ...)."""

    def feature_networks(self) -> dict[str, FeatureExtractor]:
        """Return the feature network by its configuration key, unless it is the teacher."""
        return {}

    def student_loss(self, x0: Tensor, batch: Batch, t: Tensor, draws: Draws) -> Tensor:
        """Return the adversarial loss of a student's images (B, ...), whose input was at times ``t`` (B,)."""
        view = self.view(batch, t, draws)
        return generator_loss(self(x0, batch.cond, view, draws), self.loss)

    def critic_loss(
        self, x0: Tensor, batch: Batch, t: Tensor, draws: Draws
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the critic's loss terms and metrics, on the real images of a batch and a student's ``x0``."""
        view = self.view(batch, t, draws)
        real = self(batch.x0, batch.cond, view, draws)
        fake = self(x0, batch.cond, view, draws)
        terms = {"loss": critic_loss(real, fake, self.loss)}
        if self.r1_weight:
            terms["r1"] = self.r1_weight * self.r1(batch.x0, batch.cond, view, draws)
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

    def condition(self, cond: Cond, x0: Tensor, t: Tensor) -> Tensor:
        """Return the projected vector (B, d), where the student's input was ``x0`` (B, ...) noised to times ``t`` (B,).

        At t = 1 the input contains nothing of ``x0``, and the embedding is zero for real and generated images alike.
        The vector starts with a 1: the projection of a zero vector would be a zero logit.
        """
        if self.conditioning == "none":
            return x0.new_zeros(len(x0), 0)
        given = condition_vector(cond, len(x0), self.num_classes).to(x0.device)
        vector = torch.cat([given.new_ones(len(x0), 1), given], 1)
        if self.conditioning == "condition":
            return vector
        embedded = normalize(self.features.embed(x0, cond), dim=1)
        return torch.cat([vector, expand(t < 1, embedded) * embedded], 1)

    def view(self, batch: Batch, t: Tensor, draws: Draws) -> Tensor:
        del draws
        return self.condition(batch.cond, batch.x0, t)

    def forward(self, x0: Tensor, cond: Cond, view: Tensor, draws: Draws) -> Logits:
        return self.heads(self.features.extract(x0, cond, draws), view)

    def r1(self, x0: Tensor, cond: Cond, view: Tensor, draws: Draws) -> Tensor:
        with torch.no_grad():
            features = self.features.extract(x0, cond, draws)
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
    ) -> None:
        blocks = BlockFeatures(teacher)
        example = condition_vector(teacher.family.example_cond([0]), 1, teacher.family.num_classes)
        super().__init__(Heads(blocks.shapes(), example.shape[1] + TIME_WAVES), loss, r1_weight)
        self.blocks = blocks
        self.schedule = teacher.schedule
        self.num_classes = teacher.family.num_classes
        self.location, self.scale = location, scale
        self.r1_distance = r1_distance

    def view(self, batch: Batch, t: Tensor, draws: Draws) -> Tensor:
        del batch, t
        return self.sample_times(draws)

    def sample_times(self, draws: Draws) -> Tensor:
        """Return times (B,) whose signal-to-noise ratio is that of a flow at logit-normal times."""
        u = self.location + self.scale * draws.normal().double()
        return self.schedule.inverse(-2 * u).clamp(MIN_TIME, 1.0)

    def forward(self, x0: Tensor, cond: Cond, view: Tensor, draws: Draws) -> Logits:
        x_t = self.schedule.add_noise(x0, draws.normal_like(x0), view)
        return self.heads(self.blocks(x_t, view, cond), self.condition(cond, view))

    def r1(self, x0: Tensor, cond: Cond, view: Tensor, draws: Draws) -> Tensor:
        """Return the approximate R1 penalty at real images, which Gaussian noise moves in image space."""
        noise, direction = draws.normal_like(x0), draws.normal_like(x0)
        x_t = self.schedule.add_noise(x0, noise, view)
        near = self.schedule.add_noise(x0 + self.r1_distance * direction, noise, view)
        vector = self.condition(cond, view)
        features, moved = self.blocks(x_t, view, cond), self.blocks(near, view, cond)
        return approximate_r1(lambda maps: self.heads(maps, vector), features, moved, self.r1_distance)

    def condition(self, cond: Cond, t: Tensor) -> Tensor:
        """Return the condition and the time as a vector (B, d)."""
        vector = condition_vector(cond, len(t), self.num_classes).to(t.device)
        waves = torch.stack([(k * math.pi * t).cos() for k in range(TIME_WAVES)], 1)
        return torch.cat([vector, waves.to(vector.dtype)], 1)
