"""Train a small image autoencoder, the first part of a latent teacher.

The loss is the absolute and the squared error of the reconstruction, and a light Kullback-Leibler term that keeps the
latents near a unit Gaussian (Kingma & Welling, arXiv 1312.6114; Rombach et al., arXiv 2112.10752). The absolute error
alone gives up details of one pixel, such as an earring. Where attributes are known, the latents also have to tell them
through noise: see :mod:`stepdistill.pretraining.readable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from stepdistill.pretraining.fit import FitConfig, fit
from stepdistill.pretraining.readable import LatentReader

SQUARED_WEIGHT = 5.0
"""Weight of the squared error, relative to the absolute one."""
KL_WEIGHT = 3e-4
"""Weight of the term per latent number, relative to the absolute error per colour value in [-1, 1]."""
READ_WEIGHT = 0.2
"""Weight of the mean cross-entropy of the attributes, likewise."""


class ReadVae(nn.Module):
    """The loss of an autoencoder and the reader of its latents; as a module, so that processes share its gradient."""

    def __init__(self, vae: AutoencoderKL, reader: LatentReader | None) -> None:
        super().__init__()
        self.vae, self.reader = vae, reader

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """Return the loss of images ``x`` (B, C, H, W) in [-1, 1] with attributes ``values`` (B, attributes)."""
        posterior = self.vae.encode(x).latent_dist
        z = posterior.sample()
        error = self.vae.decode(z).sample - x
        total = error.abs().mean() + SQUARED_WEIGHT * error.square().mean()
        total = total + KL_WEIGHT * posterior.kl().mean() / z[0].numel()
        if self.reader is not None:
            total = total + READ_WEIGHT * self.reader.loss(z, values)
        return total


def train_vae(
    images: Tensor, values: Tensor, sizes: Sequence[int], config: FitConfig, accelerator: Accelerator, log: Path
) -> AutoencoderKL:
    """Train an autoencoder on images; its latent channels have mean 0 and variance 1.

    Args:
        images: (N, C, H, W) in [-1, 1].
        values: what the latents have to tell of each image, (N, attributes), indices; of no attributes, (N, 0).
        sizes: number of values of each attribute.
        config: of the training.
        accelerator: device, precision and processes.
        log: file for the loss.
    """

    def loss(network: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        del generator
        value: Tensor = network(images[index].to(accelerator.device), values[index].to(accelerator.device))
        return value

    torch.manual_seed(config.seed)
    vae = AutoencoderKL(**config.model, scaling_factor=1.0)
    parts = ReadVae(vae, LatentReader(latent_numbers(vae), sizes) if sizes else None)
    vae = fit(parts, loss, count=len(images), config=config, accelerator=accelerator, log=log).vae.eval()
    whiten(vae, encode(vae, images, accelerator.device))
    return vae


def latent_numbers(vae: AutoencoderKL) -> int:
    """Return how many numbers the latents of one image have."""
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    return int(vae.config.latent_channels * side**2)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, device: torch.device, batch_size: int = 100) -> Tensor:
    """Return the means of the posterior, (N, c, h, w), of ``images`` (N, C, H, W) in [-1, 1]."""
    batches = images.split(batch_size)
    return torch.cat([vae.encode(batch.to(device)).latent_dist.mode().cpu() for batch in batches])


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Shift and scale the latent channels to mean 0 and variance 1, by the two 1 x 1 convolutions around them.

    This is exact: reconstructions stay the same, and pipelines need no other ``scaling_factor`` than 1.

    Args:
        vae: the autoencoder, which is changed in place.
        latents: (N, c, h, w), its present latents of the images.
    """
    mean = latents.mean((0, 2, 3)).to(vae.device)
    std = latents.std((0, 2, 3)).to(vae.device)
    into, out = vae.quant_conv, vae.post_quant_conv
    assert into is not None and out is not None, "an AutoencoderKL has both unless its config leaves them out"
    channels = len(mean)
    into.bias[:channels] -= mean
    into.weight[:channels] /= std.view(-1, 1, 1, 1)
    into.bias[:channels] /= std
    into.bias[channels:] -= 2 * std.log()  # the logarithms of the variances
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std.view(1, -1, 1, 1)
