"""The critic of DMD2: a head on the fake score's bottleneck (Yin et al. 2024, arXiv 2405.14867, Appendix F.1).

The bottleneck of a transformer is its middle block. Its tokens are laid out as a map of the image, so that the head is
the same for all networks. Of an image of another size than the teacher's, what the strided convolutions leave is
averaged to what they leave of the teacher's; a map that is too small for them is enlarged before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from stepdistill.batch import Cond
from stepdistill.discriminators.feature_sources import MapFeatures
from stepdistill.discriminators.heads import aspect_of, grid_shape
from stepdistill.losses.adversarial import Logits, critic_loss, critic_metrics, generator_loss
from stepdistill.losses.levels import sample_times
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import BlockFeatures
from stepdistill.networks.hooks import middle_block
from stepdistill.randomness import Draws


class Covering(nn.Conv2d):
    """A convolution over all pixels of a map; a map of another size is averaged to its kernel's."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, 1, 1) of a map (B, C, H, W)."""
        height, width = self.kernel_size
        return super().forward(adaptive_avg_pool2d(x, (height, width)))


class BottleneckHead(nn.Module):
    """Convolutions of stride 2 down to four pixels, one over the remaining pixels, and a linear layer.

    The features already contain the image's condition and its noise level.

    Args:
        shape: (C, H, W) of the feature map, or (C, N) of tokens, at the teacher's size.
        aspect: height over width of the image that tokens cover row by row.
    """

    def __init__(self, shape: Sequence[int], aspect: float = 1.0) -> None:
        super().__init__()
        self.map_shape = grid_shape(shape, aspect)
        assert len(self.map_shape) == 3, f"{shape[1]} tokens do not cover an image of aspect {aspect}"
        channels, *size = self.map_shape
        self.least = 1
        layers: list[nn.Module] = []
        while min(size) > 4:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), *_norm_silu(channels)]
            size = [n // 2 for n in size]
            self.least *= 2  # pixels a side, of which the strided convolutions leave one
        layers += [Covering(channels, channels, (size[0], size[1])), *_norm_silu(channels)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 1))

    def forward(self, feature: Tensor) -> Tensor:
        """Return logits (B, 1) of a feature (B, *shape), or of a map (B, C, H, W) of another size."""
        x = feature if feature.ndim == 4 else feature.reshape(len(feature), *self.map_shape)
        height, width = x.shape[-2:]
        if min(height, width) < self.least:
            x = adaptive_avg_pool2d(x, (max(height, self.least), max(width, self.least)))
        return self.body(x)


def _norm_silu(channels: int) -> list[nn.Module]:
    """Return a normalisation in groups of 16 channels or more, and SiLU: groups of two have only signs left."""
    groups = math.gcd(channels, max(1, min(32, channels // 16)))
    return [nn.GroupNorm(groups, channels), nn.SiLU()]


class BottleneckCritic:
    """A head on the middle of the fake score, at noised images.

    It is a plain object, since the fake score belongs to the bank; the method registers and trains :attr:`head`.
    """

    def __init__(self, fake: Denoiser) -> None:
        family = fake.family
        blocks = BlockFeatures(fake, [middle_block(family.network, family.feature_blocks)])
        self.blocks = MapFeatures(blocks)
        self.head = BottleneckHead(blocks.shapes()[-1], aspect_of(family.sample_shape))
        self.schedule = fake.schedule

    def __call__(self, images: Sequence[Tensor], cond: Cond, draws: Draws) -> list[Logits]:
        """Return the logits of several batches of clean images (B, ...), noised to independent times, in one call."""
        times, noises = [], []
        for _ in images:
            times.append(sample_times(self.schedule, draws))
        for x0 in images:
            noises.append(draws.normal_like(x0))
        t = torch.cat(times)
        x_t = self.schedule.add_noise(torch.cat(list(images)), torch.cat(noises), t)
        repeated = {name: torch.cat([value] * len(images)) for name, value in cond.items()}
        return [[part] for part in self.logits(x_t, t, repeated).chunk(len(images))]

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the logits (B, 1) of noised images (B, ...) at times (B,)."""
        return self.head(self.blocks(x_t, t, cond)[-1])

    def generator_loss(self, x0: Tensor, cond: Cond, draws: Draws) -> Tensor:
        """Return the student's loss on its images (B, ...)."""
        (logits,) = self([x0], cond, draws)
        return generator_loss(logits, "softplus")

    def critic_loss(self, real: Tensor, fake: Tensor, cond: Cond, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the critic's loss on real and generated images (B, ...), and metrics for the log."""
        real_logits, fake_logits = self([real, fake], cond, draws)
        metrics = critic_metrics(real_logits, fake_logits)
        return critic_loss(real_logits, fake_logits, "softplus"), metrics
