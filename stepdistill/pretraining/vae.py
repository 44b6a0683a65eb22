"""Train a small image autoencoder, the first part of a latent teacher.

The loss is the absolute and the squared error of the reconstruction, and a light Kullback-Leibler term that keeps the
latents near a unit Gaussian (Kingma & Welling, arXiv 1312.6114; Rombach et al., arXiv 2112.10752). The absolute error
alone gives up details of one pixel, such as an earring.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from stepdistill.pretraining.fit import FitConfig, fit

SQUARED_WEIGHT = 3.0
"""Weight of the squared error, relative to the absolute one."""
KL_WEIGHT = 5e-4
"""Weight of the term per latent number, relative to the absolute error per colour value in [-1, 1]."""


def train_vae(images: Tensor, config: FitConfig, accelerator: Accelerator, log: Path) -> AutoencoderKL:
    """Train an autoencoder on ``images`` (N, C, H, W) in [-1, 1]; its latent channels have mean 0 and variance 1."""

    def loss(network: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        del generator
        x = images[index].to(accelerator.device)
        model = accelerator.unwrap_model(network)
        posterior = model.encode(x).latent_dist
        error = model.decode(posterior.sample()).sample - x
        reconstruction = error.abs().mean() + SQUARED_WEIGHT * error.square().mean()
        return reconstruction + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    torch.manual_seed(config.seed)
    vae = AutoencoderKL(**config.model, scaling_factor=1.0)
    vae = fit(vae, loss, count=len(images), config=config, accelerator=accelerator, log=log).eval()
    whiten(vae, encode(vae, images, accelerator.device))
    return vae


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
