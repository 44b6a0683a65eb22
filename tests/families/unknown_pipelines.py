"""Random miniatures of diffusers pipelines that no hand-written family serves."""

from __future__ import annotations

from typing import Any

import torch

from stepdistill.families.tiny import tiny_clip, tiny_frames_vae, tiny_qwen, tiny_t5, tiny_vae


def tiny_vae_of(blocks: int, **options: Any) -> Any:
    """A random ``AutoencoderKL`` with so many blocks, each but the last of which halves the size."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * blocks, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **options,
    )  # fmt: skip


def cog_video_x() -> Any:
    """Clips with frames before channels; a scheduler of its own, whose alphas are not those of its betas."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    tokenizer, text_encoder = tiny_t5(width=32)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=226,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0,
    )  # fmt: skip
    return CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler)


def hunyuan_dit() -> Any:
    """Two text encoders with masks, learned variance, sizes as conditions, a state scaled by its scheduler."""
    from diffusers import AutoencoderKL, DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
    from transformers import BertConfig, BertModel

    tokenizer, text_encoder = tiny_t5(width=32)
    bert = BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    )
    transformer = HunyuanDiT2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    vae: AutoencoderKL = tiny_vae()
    return HunyuanDiTPipeline(
        vae, bert, tokenizer, transformer, DDPMScheduler(), None, None, False, text_encoder, tokenizer
    )


def latte() -> Any:
    """Clips of a network with learned variance."""
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    tokenizer, text_encoder = tiny_t5(width=32)
    transformer = LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=4,
    )  # fmt: skip
    return LattePipeline(tokenizer, text_encoder, tiny_vae(), transformer, DDIMScheduler(clip_sample=False))


def cog_view3() -> Any:
    """Sizes as conditions; a scheduler that keeps its last prediction."""
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline, CogView3PlusTransformer2DModel

    tokenizer, text_encoder = tiny_t5(width=32)
    transformer = CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=True,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=4.0,
    )  # fmt: skip
    return CogView3PlusPipeline(tokenizer, text_encoder, tiny_vae_of(4), transformer, scheduler)


def cog_view4() -> Any:
    """Prompts filled up to the longest of a batch."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import GlmConfig, GlmModel

    tokenizer, _ = tiny_t5(width=16)
    encoder = GlmModel(
        GlmConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0,
        )
    )  # fmt: skip
    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return CogView4Pipeline(tokenizer, encoder, tiny_vae_of(4, scaling_factor=1.0), transformer, scheduler)


def ltx() -> Any:
    """Clips as tokens, whose frames and frame rate the network is told."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    tokenizer, text_encoder = tiny_t5(width=16)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, caption_channels=16,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, timestep_conditioning=False, patch_size=1,
        patch_size_t=1,
    )  # fmt: skip
    return LTXPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, text_encoder, tokenizer, transformer)


def krea2() -> Any:
    """States of several layers of a text encoder; guidance that is added on top, whose 0 is none."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    tokenizer = tiny_qwen()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return Krea2Pipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), tiny_frames_vae(), encoder, tokenizer, transformer,
        text_encoder_select_layers=(1, 2),
    )  # fmt: skip


def hunyuan_video() -> Any:
    """Clips; guidance is an input of the network; two text encoders."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import LlamaConfig, LlamaModel

    tokenizer = tiny_qwen()
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    letters, clip = tiny_clip(width=8)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1, act_fn="silu",
        norm_num_groups=4, scaling_factor=0.476986, spatial_compression_ratio=8, temporal_compression_ratio=4,
        mid_block_add_attention=True,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return HunyuanVideoPipeline(llama, tokenizer, transformer, vae, scheduler, clip, letters)


UNKNOWN = {
    "cog_view3": (cog_view3, {"resolution": 32}), "hunyuan_dit": (hunyuan_dit, {"resolution": 16}),
    "cog_video_x": (cog_video_x, {"resolution": 16, "frames": 9}), "latte": (latte, {"resolution": 16, "frames": 4}),
    "hunyuan_video": (hunyuan_video, {"resolution": 16, "frames": 5}), "krea2": (krea2, {"resolution": 16}),
    "ltx": (ltx, {"resolution": 32, "frames": 9}), "cog_view4": (cog_view4, {"resolution": 32}),
}  # fmt: skip
"""Pipeline, and the options of the family that observes it."""


def make(name: str) -> tuple[Any, dict[str, Any]]:
    """A miniature's pipeline and options."""
    torch.manual_seed(0)
    maker, options = UNKNOWN[name]
    return maker(), dict(options)
