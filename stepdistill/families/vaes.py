"""What a latent pipeline's VAE and network say about sizes, channels and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the precision that a network takes its inputs in: of its first parameter not kept in float32."""
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    names = dict(network.named_parameters())
    free = [name for name in names if not any(part in name for part in kept)]
    return names[free[0]].dtype


def latent_channels(vae: Any) -> int:
    """Return the number of channels of a VAE's latents."""
    return vae.config.get("latent_channels") or vae.config["z_dim"]


def check_channels(network: Any, vae: Any, packed: int) -> None:
    """Raise ``ValueError`` with both numbers unless the network takes the latents of the VAE."""
    channels = latent_channels(vae)
    taken, made = network.config.in_channels, channels * packed
    if taken != made:
        raise ValueError(
            f"vae/config.json: expected latents of {taken // packed} channels, as {type(network).__name__} takes them, "
            f"got latent_channels {channels}"
        )


def latent_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(shift, scale)``, (1, C, 1, ...) or scalars: the network's latents are ``(VAE's - shift) * scale``.

    A VAE has a scale and perhaps a shift, statistics of every channel, or, as FLUX.2's, those of a batch norm.
    """
    config, view = vae.config, (1, -1, *[1] * (like.ndim - 2))
    if "batch_norm_eps" in config:
        std = (vae.bn.running_var + config["batch_norm_eps"]).sqrt()
        return vae.bn.running_mean.view(view).to(like), (1 / std).view(view).to(like)
    scale, mean, std = config.get("scaling_factor", 1.0), config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return like.new_tensor(mean).view(view), scale / like.new_tensor(std).view(view)
    return like.new_tensor(config.get("shift_factor") or 0.0), like.new_tensor(scale)


def mode(encoded: Mapping[str, Any]) -> Tensor:
    """Return the latents that a VAE's ``encode`` returns: the mode of a posterior, or what a deterministic one gives.

    They stand under ``latent_dist`` (AutoencoderKL), ``latent`` (AutoencoderDC) or ``latents`` (AutoencoderTiny).
    """
    if "latent_dist" in encoded:
        return encoded["latent_dist"].mode()
    return encoded["latents"] if "latents" in encoded else encoded["latent"]
