"""The common part of the UNets of Stable Diffusion and SDXL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.diffusion.schedule import Karras, NoiseSchedule
from stepdistill.families.base import Inputs

UNET_LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "conv_in", "conv_out", "cond_proj",
)  # fmt: skip
"""LCM-LoRA's layers (Luo et al. 2023, arXiv 2311.05556), both ends, and the guidance input if there is one."""


W_FEATURES = 256
"""Fourier features of the guidance weight."""


def check_unet(unet: Any) -> None:
    """Raise ``ValueError`` unless the network is a text-to-image teacher."""
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError(
            "unet/config.json: time_cond_proj_dim is set: this is a student that takes its guidance as an input and "
            "cannot be distilled again; expected its teacher"
        )
    if unet.config.in_channels != unet.config.out_channels:
        raise ValueError(
            f"unet/config.json: {unet.config.in_channels} channels in, {unet.config.out_channels} out: an inpainting "
            "or image-conditioned network; expected text-to-image"
        )


def start_as_stock_pipelines(schedule: NoiseSchedule) -> None:
    """Start samplers of an EDM process where stock pipelines do: at sigma_max, with data of unit variance in it."""
    match schedule:
        case Karras():
            schedule.initial_sigma = (schedule.sigma_max**2 + 1) ** 0.5


def extend_unet(unet: Any, inputs: Inputs) -> None:
    """Give the network diffusers' guidance input (``time_cond_proj_dim``), zero at first."""
    if inputs.w is None:
        return
    embedding = unet.time_embedding
    embedding.cond_proj = nn.Linear(W_FEATURES, embedding.linear_1.in_features, bias=False)
    nn.init.zeros_(embedding.cond_proj.weight)
    nn.Module.to(embedding, unet.device, unet.dtype)
    unet.register_to_config(time_cond_proj_dim=W_FEATURES)


def guidance_features(pipe: Any, w: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the pipeline's own Fourier features (B, 256) of guidance weights (B,); None without weights."""
    if w is None:
        return None
    with torch.device(w.device):
        return pipe.get_guidance_scale_embedding(w.float(), embedding_dim=W_FEATURES).to(dtype)
