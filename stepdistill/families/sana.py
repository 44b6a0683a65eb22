"""Sana: a flow transformer with linear attention on latents of a deep autoencoder, with a prompt through Gemma."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.batch import Cond
from stepdistill.diffusion.schedule import DiscreteVP, RectifiedFlow
from stepdistill.families.latent import PlainLatentFamily, TextToImageFamily
from stepdistill.families.prompts import default_of, masked
from stepdistill.families.tiny import tiny_gemma


class Sana(PlainLatentFamily, TextToImageFamily):
    """An opened ``SanaPipeline``."""

    component = "transformer"
    network_classes = ("SanaTransformer2DModel",)
    pipeline_names = ("SanaPipeline",)
    parts = ("vae", "text_encoder", "tokenizer")
    processes = (DiscreteVP, RectifiedFlow)
    feature_blocks = ("transformer_blocks",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    loads_lora = True

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        length = default_of(pipe, "max_sequence_length")
        self.pipeline_kwargs = {**self.pipeline_kwargs, "max_sequence_length": length}

    def size_multiple(self) -> int:
        return 32  # which the pipeline's call wants, whatever its VAE

    @classmethod
    def tiny(cls, seed: int = 0) -> Sana:
        from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

        torch.manual_seed(seed)
        tokenizer, text_encoder = tiny_gemma(width=16)
        blocks = {"channels": (8, 8, 8), "layers": (1, 1, 1), "scales": ((), (), ())}
        vae = AutoencoderDC(
            latent_channels=4, attention_head_dim=4, scaling_factor=0.41407,
            encoder_block_out_channels=blocks["channels"], decoder_block_out_channels=blocks["channels"],
            encoder_layers_per_block=blocks["layers"], decoder_layers_per_block=blocks["layers"],
            encoder_qkv_multiscales=blocks["scales"], decoder_qkv_multiscales=blocks["scales"],
        )  # fmt: skip
        transformer = SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
            sample_size=8,
        )  # fmt: skip
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        return cls(SanaPipeline(tokenizer, text_encoder, vae, transformer, scheduler))

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        instruction = default_of(self.pipe, "complex_human_instruction")
        device = self.pipe.text_encoder.device
        embedded = self.pipe.encode_prompt(list(prompts), null, device=device, complex_human_instruction=instruction)
        return masked(embedded, null)

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output = network(
            x_t,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=cond["encoder_attention_mask"],
            timestep=timestep * self.pipe.transformer.config.timestep_scale,
        ).sample
        return output[:, : x_t.shape[1]]  # the other channels, if any, are a variance
