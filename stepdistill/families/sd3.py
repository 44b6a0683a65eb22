"""Stable Diffusion 3: a flow transformer on latents with a prompt through two CLIP encoders and T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.batch import Cond
from stepdistill.diffusion.schedule import DiscreteVP, RectifiedFlow
from stepdistill.families.flux import shifted_by_size
from stepdistill.families.latent import PlainLatentFamily, TextToImageFamily
from stepdistill.families.tiny import tiny_t5


class SD3(PlainLatentFamily, TextToImageFamily):
    """An opened ``StableDiffusion3Pipeline``."""

    component = "transformer"
    network_classes = ("SD3Transformer2DModel",)
    pipeline_names = ("StableDiffusion3Pipeline",)
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    optional_parts = ("text_encoder_3", "tokenizer_3")  # without T5 the pipeline feeds zeros
    hands_generators_on = False
    side_multiple = 2
    processes = (DiscreteVP, RectifiedFlow)
    feature_blocks = ("transformer_blocks",)
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",  # the second attention of SD3.5-medium
    )  # fmt: skip
    loads_lora = True

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        _, height, width = self.sample_shape
        tokens = (height // pipe.transformer.config.patch_size) * (width // pipe.transformer.config.patch_size)
        self.schedule = shifted_by_size(self.schedule, self.scheduler_config, tokens)

    @classmethod
    def tiny(cls, seed: int = 0, *, dual_attention: bool = False) -> SD3:
        """Return Stable Diffusion 3, or with ``dual_attention`` 3.5 medium, which also normalises queries and keys."""
        from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

        from stepdistill.families.tiny import tiny_clip, tiny_vae

        torch.manual_seed(seed)
        tokenizer, text_encoder = tiny_clip(projection=True)
        tokenizer_2, text_encoder_2 = tiny_clip(projection=True)
        tokenizer_3, text_encoder_3 = tiny_t5(width=32)
        options = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if dual_attention else {}
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
            pos_embed_max_size=8, **options,
        )  # fmt: skip
        vae = tiny_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
        return cls(
            StableDiffusion3Pipeline(
                transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, text_encoder, tokenizer, text_encoder_2,
                tokenizer_2, text_encoder_3, tokenizer_3,
            )
        )  # fmt: skip

    def check_size(self, size: tuple[int, int], key: str) -> None:
        super().check_size(size, key)
        config = self.pipe.transformer.config
        most = config.pos_embed_max_size * config.patch_size * self.spatial_factor()
        if max(size) > most:
            raise ValueError(f"{key}: expected at most {most} a side, the places it has, got {list(size)}")

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        prompt, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            list(prompts), None, None, device=self.pipe.text_encoder.device, do_classifier_free_guidance=null
        )
        if null:
            prompt, pooled = negative, negative_pooled
        return {"encoder_hidden_states": prompt.float(), "pooled_projections": pooled.float()}

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return network(
            hidden_states=x_t,
            timestep=timestep,
            **{name: value.to(x_t.dtype) for name, value in cond.items()},
        ).sample
