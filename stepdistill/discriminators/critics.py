r"""What adversarial methods share: what a student is shown, the critics it is trained against, and their turn.

A critic here is a module with one entry, logits of clean images under their conditions in a ``view`` that real and
fake images share. There are two:

- :class:`CleanCritic` looks at clean images through a frozen feature network (ADD), under projections of the condition
  and of the embedding of the image that was noised;
- :class:`RenoisedCritic` noises images again and looks through the teacher itself (LADD, Sauer et al. 2024, arXiv
  2403.12015): at high noise it judges structure, at low noise texture, and latents need no decoding.
"""

from __future__ import annotations

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
from stepdistill.losses.adversarial import Logits, approximate_r1, r1_penalty
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import BlockFeatures
from stepdistill.randomness import Draws

Conditioning = Literal["none", "condition", "both"]


MIN_TIME = 1e-3


TIME_WAVES = 4


class CleanCritic(nn.Module):
    """Heads on what some eyes see in clean images.

    Args:
        family: says what conditions there are.
        eyes: the frozen features.
        conditioning: what is projected: nothing, the condition, or also the embedding of the image that was noised.
    """

    def __init__(self, family: Family, eyes: FeatureSource, conditioning: Conditioning) -> None:
        super().__init__()
        self.eyes = eyes
        self.conditioning = conditioning
        self.num_classes = family.num_classes
        known = condition_vector(family.example_cond([0]), 1, family.num_classes).shape[1]
        sizes = {"none": 0, "condition": 1 + known, "both": 1 + known + eyes.num_embedded}
        self.heads = Heads(eyes.shapes, sizes[conditioning])

    def condition(self, cond: Cond, x0: Tensor, t: Tensor) -> Tensor:
        """What is projected (B, d), where the student was shown ``x0`` (B, ...) noised to times ``t`` (B,).

        At t = 1 it was shown none of it, and the embedding is the zero vector, for real and fake alike. The vector
        starts with a 1, or a critic that is told nothing there could say nothing: the projection of zeros is no logit.
        """
        if self.conditioning == "none":
            return x0.new_zeros(len(x0), 0)
        given = condition_vector(cond, len(x0), self.num_classes).to(x0.device)
        vector = torch.cat([given.new_ones(len(x0), 1), given], 1)
        if self.conditioning == "condition":
            return vector
        embedded = normalize(self.eyes.embed(x0, cond), dim=1)
        return torch.cat([vector, expand(t < 1, embedded) * embedded], 1)

    def view(self, batch: Batch, draws: Draws) -> Tensor:
        """The :meth:`condition` of a student that was shown noise alone."""
        del draws
        return self.condition(batch.cond, batch.x0, torch.ones(batch.size, device=batch.x0.device))

    def forward(self, x0: Tensor, cond: Cond, vector: Tensor, draws: Draws) -> Logits:
        """Logits of clean images (B, ...); ``vector`` is of :meth:`condition`."""
        return self.heads(self.eyes.extract(x0, cond, draws), vector)

    def r1(self, x0: Tensor, cond: Cond, vector: Tensor, draws: Draws) -> Tensor:
        """:func:`~stepdistill.losses.adversarial.r1_penalty` of the heads at real images."""
        with torch.no_grad():
            features = self.eyes.extract(x0, cond, draws)
        return r1_penalty(lambda leaves: self.heads(leaves, vector), features)


class RenoisedCritic(nn.Module):
    """Heads on what the teacher sees in images that were noised again.

    Args:
        teacher: whose blocks are watched, and whose schedule noises.
        location: of the logit-normal noise levels, ``sigmoid(location + scale n)`` in a flow's time; larger is noisier.
        scale: their spread.
    """

    def __init__(self, teacher: Denoiser, location: float, scale: float) -> None:
        super().__init__()
        self.blocks = BlockFeatures(teacher)
        self.schedule = teacher.schedule
        self.num_classes = teacher.family.num_classes
        self.location, self.scale = location, scale
        example = condition_vector(teacher.family.example_cond([0]), 1, self.num_classes)
        self.heads = Heads(self.blocks.shapes(), example.shape[1] + TIME_WAVES)

    def sample_times(self, draws: Draws) -> Tensor:
        """Times (B,) of the schedule at which signal and noise are to each other as in a flow of logit-normal time."""
        u = self.location + self.scale * draws.normal().double()
        return self.schedule.inverse(-2 * u).clamp(MIN_TIME, 1.0)

    def view(self, batch: Batch, draws: Draws) -> Tensor:
        """The :meth:`sample_times`."""
        del batch
        return self.sample_times(draws)

    def forward(self, x0: Tensor, cond: Cond, t: Tensor, draws: Draws) -> Logits:
        """Logits of clean images (B, ...) noised to times (B,) with fresh noise."""
        x_t = self.schedule.add_noise(x0, draws.normal_like(x0), t)
        return self.heads(self.blocks(x_t, t, cond), self.condition(cond, t))

    def r1(self, x0: Tensor, cond: Cond, t: Tensor, draws: Draws, distance: float) -> Tensor:
        """The approximate R1 penalty at real images, moved by Gaussian noise in image space."""
        noise, nudge = draws.normal_like(x0), draws.normal_like(x0)
        x_t, near = (self.schedule.add_noise(x, noise, t) for x in (x0, x0 + distance * nudge))
        vector = self.condition(cond, t)
        features, moved = self.blocks(x_t, t, cond), self.blocks(near, t, cond)
        return approximate_r1(lambda seen: self.heads(seen, vector), features, moved, distance)

    def condition(self, cond: Cond, t: Tensor) -> Tensor:
        """The condition and the time (B, d)."""
        vector = condition_vector(cond, len(t), self.num_classes).to(t.device)
        waves = torch.stack([(k * math.pi * t).cos() for k in range(TIME_WAVES)], 1)
        return torch.cat([vector, waves.to(vector.dtype)], 1)
