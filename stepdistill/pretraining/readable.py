"""Read an image's attributes from its noisy latents, so that an autoencoder learns to give them room there.

A detail of two pixels, such as a smile, is little of an autoencoder's latents. Noise hides it at once, so a denoising
loss hardly rewards a network that knows it from the prompt, and the teacher leaves it to chance. A small network that
must read the attributes from latents at many noise levels, trained with the autoencoder, makes the encoder spend more
on them; the reconstructions need not change. Autoencoders for diffusion are aligned with the features of a large
vision model for the like reason (Yao et al., arXiv 2501.01423).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepdistill.data.columns import Texts
from stepdistill.features.vocabulary import UNASKED, Vocabulary

LARGEST_ANGLE = 0.45 * math.pi
"""Of the noise, ``x_t = cos(angle) z + sin(angle) eps``: the clean latents have a sixth of the noise's size there."""
HIDDEN = 256
"""Width of the reading network."""


class LatentReader(nn.Module):
    """A perceptron that reads attributes from noisy latents.

    Args:
        numbers: in the latents of an image.
        sizes: number of values of each attribute.
    """

    def __init__(self, numbers: int, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.layers = nn.Sequential(nn.Linear(numbers + 1, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, sum(self.sizes)))

    def forward(self, x_t: Tensor, alpha_t: Tensor) -> tuple[Tensor, ...]:
        """Return the scores (B, values) of each attribute, of latents (B, c, h, w) with a share ``alpha_t`` (B, 1)."""
        return self.layers(torch.cat([x_t.flatten(1), alpha_t], dim=1)).split(self.sizes, dim=1)

    def loss(self, z: Tensor, values: Tensor) -> Tensor:
        """Return the mean cross-entropy of the attributes ``values`` (B, attributes) at random noise levels.

        Args:
            z: clean latents (B, c, h, w), brought to mean 0 and variance 1 a channel here, so that an encoder gains
                nothing by mere scale.
            values: indices of values.
        """
        angle = LARGEST_ANGLE * torch.rand(len(z), 1, device=z.device)
        alpha_t, sigma_t = angle.cos(), angle.sin()
        z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
        x_t = alpha_t[..., None, None] * z + sigma_t[..., None, None] * torch.randn_like(z)
        losses = [nn.functional.cross_entropy(s, v) for s, v in zip(self(x_t, alpha_t), values.T, strict=True)]
        return torch.stack(losses).mean()


def named_values(vocabulary: Vocabulary, captions: Sequence[Texts]) -> tuple[Tensor, list[int]]:
    """Return what the captions of each image say of it, (N, attributes), and the number of values of each attribute.

    The last value of every attribute stands for images of which no caption names it.
    """
    values = vocabulary.asked([", ".join(texts) for texts in captions])
    unnamed = torch.tensor(vocabulary.sizes)
    return torch.where(values == UNASKED, unnamed, values), (unnamed + 1).tolist()
