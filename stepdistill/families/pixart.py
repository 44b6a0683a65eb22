"""PixArt-alpha and PixArt-sigma: a transformer on latents with a prompt through T5. It also predicts a variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.batch import Cond
from stepdistill.diffusion.schedule import DiscreteVP
from stepdistill.families.latent import PlainLatentFamily, TextToImageFamily
from stepdistill.families.prompts import default_of, masked


class PixArt(PlainLatentFamily, TextToImageFamily):
    """An opened ``PixArtAlphaPipeline`` or ``PixArtSigmaPipeline``."""

    component = "transformer"
    network_classes = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second in older files
    pipeline_names = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    parts = ("vae", "text_encoder", "tokenizer")
    scales_states = True
    side_multiple = 2
    processes = (DiscreteVP,)
    feature_blocks = ("transformer_blocks",)
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "linear", "linear_1", "linear_2", "proj",
        "proj_out",
    )  # fmt: skip

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        length = default_of(pipe, "max_sequence_length")
        # no cleaning of captions: it needs packages that a caller may lack, who would then get other images
        self.pipeline_kwargs = {**self.pipeline_kwargs, "clean_caption": False, "max_sequence_length": length}

    @classmethod
    def tiny(cls, seed: int = 0, *, sigma: bool = False) -> PixArt:
        """Return PixArt-alpha, which takes resolution and aspect ratio, or with ``sigma`` PixArt-sigma."""
        from diffusers import (
            DPMSolverMultistepScheduler,
            PixArtAlphaPipeline,
            PixArtSigmaPipeline,
            PixArtTransformer2DModel,
        )

        from stepdistill.families.tiny import tiny_t5, tiny_vae

        torch.manual_seed(seed)
        tokenizer, text_encoder = tiny_t5(width=32)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=128,
            cross_attention_dim=24, caption_channels=32, use_additional_conditions=not sigma,
        )  # fmt: skip
        scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
        pipeline = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
        return cls(pipeline(tokenizer, text_encoder, tiny_vae(), transformer, scheduler), resolution=16)

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        return masked(self.pipe.encode_prompt(list(prompts), null, device=self.pipe.text_encoder.device), null)

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output = network(
            x_t,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=cond["encoder_attention_mask"],
            timestep=timestep,
            added_cond_kwargs=self.sizes(x_t),
        ).sample
        return output[:, : x_t.shape[1]]  # the other channels, if any, are the variance

    def sizes(self, x_t: Tensor) -> dict[str, Tensor | None]:
        """Return the network's resolution and aspect ratio inputs; None for networks without them."""
        if not self.pipe.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = self.image_size(x_t)
        resolution, ratio = x_t.new_tensor([height, width]), x_t.new_tensor([height / width])
        return {"resolution": resolution.repeat(len(x_t), 1), "aspect_ratio": ratio.repeat(len(x_t), 1)}
