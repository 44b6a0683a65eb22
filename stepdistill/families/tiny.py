"""Random miniatures of the parts of pipelines, for tests without a download."""

from __future__ import annotations

import itertools
from typing import Any

import torch


def tiny_gemma(width: int, layers: int = 1) -> tuple[Any, Any]:
    """Return a tokenizer of letters and their pairs, made in memory, and a random Gemma 2 for it."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    pairs = list(itertools.product("abcdefghijklmnopqrstuvwxyz\u2581", repeat=2))
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,.'"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, *("".join(pair) for pair in pairs)]
    tokenizer = GemmaTokenizer({piece: i for i, piece in enumerate(pieces)}, pairs)
    config = Gemma2Config(
        vocab_size=len(pieces), hidden_size=width, intermediate_size=width, num_hidden_layers=layers, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return tokenizer, Gemma2Model(config)


def tiny_unet(**options: Any) -> Any:
    """Return a random ``UNet2DConditionModel`` on latents of 8 x 8."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )  # fmt: skip


def tiny_vae(**options: Any) -> Any:
    """Return a random ``AutoencoderKL`` that halves the size of images."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, **blocks, **options)


def tiny_deep_vae() -> Any:
    """Return a random ``AutoencoderKL`` of FLUX.1's scale, in which a latent is a square of 8 pixels."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, sample_size=32, latent_channels=4, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False, **blocks,
    )  # fmt: skip


def tiny_clip(*, projection: bool = False, width: int = 16) -> tuple[Any, Any]:
    """Return a tokenizer of bytes, made in memory, and a random CLIP text encoder for it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=width,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    return tokenizer, (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def tiny_t5(width: int) -> tuple[Any, Any]:
    """Return a tokenizer of letters, made in memory, and a random T5 encoder for it."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,.'"]
    tokenizer = T5Tokenizer([(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0, model_max_length=512)
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return tokenizer, T5EncoderModel(config)


QWEN_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""A chat in words of Qwen, whose messages are texts or lists that begin with one."""


def tiny_qwen() -> Any:
    """Return a tokenizer of bytes with a chat template, made in memory; its model is the caller's."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: place for place, letter in enumerate(letters)}, merges=[], model_max_length=1024,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def tiny_qwen3(kind: Any, tokenizer: Any, *, width: int, layers: int) -> Any:
    """Return a random Qwen 3 of the class ``kind`` for a tokenizer."""
    from transformers import Qwen3Config

    return kind(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, head_dim=width // 2,
        )
    )  # fmt: skip


def tiny_flux_vae() -> Any:
    """Return a random VAE with the scale of FLUX.1's, which Z-Image and Chroma use too."""
    return tiny_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def tiny_qwen_vl(tokenizer: Any, *, width: int) -> Any:
    """Return a random Qwen 2.5 VL for a tokenizer."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    layers = {"hidden_size": width, "intermediate_size": 16}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = {
        "vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "rope_parameters": rope, **layers,
    }  # fmt: skip
    vision = {"depth": 1, "num_heads": 2, "out_hidden_size": width, **layers}
    places = {"image_token_id": 0, "video_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **places))


def tiny_frames_vae() -> Any:
    """Return a random VAE of Qwen-Image, which takes images as clips of one frame and halves their size."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
    )  # fmt: skip


def tiny_mistral(tokenizer: Any, *, width: int) -> Any:
    """Return a random Mistral 3 of 30 layers, as FLUX.2-dev reads, for a tokenizer."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    layers = {"hidden_size": width, "num_attention_heads": 2}
    text = {
        "model_type": "mistral", "vocab_size": len(tokenizer), "intermediate_size": 16, "num_hidden_layers": 30,
        "num_key_value_heads": 1, "head_dim": width // 2, "max_position_embeddings": 512, **layers,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4,
        **layers,
    }  # fmt: skip
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=5))


def tiny_patch_vae() -> Any:
    """Return a random VAE of FLUX.2, with the statistics of its patches."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def tiny_umt5(width: int) -> tuple[Any, Any]:
    """Return the tokenizer of :func:`tiny_t5` and a random UMT5 encoder for it, as Wan reads prompts."""
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer, _ = tiny_t5(width)
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return tokenizer, UMT5EncoderModel(config)


def tiny_clip_vae() -> Any:
    """Return a random VAE of Wan: a latent is a square of 4 pixels, and all but the first are of 4 frames."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0], scale_factor_temporal=4,
        scale_factor_spatial=4,
    )  # fmt: skip


def tiny_residual_clip_vae() -> Any:
    """Return a random VAE as that of Wan 2.2 TI2V-5B: a latent is a square of 8 pixels."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0], is_residual=True, in_channels=12,
        out_channels=12, patch_size=2, scale_factor_temporal=4, scale_factor_spatial=8,
    )  # fmt: skip


def tiny_aura_flow(seed: int = 0) -> Any:
    """Return a random miniature of ``AuraFlowPipeline``."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(seed)
    tokenizer, text_encoder = tiny_t5(width=32)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    with torch.no_grad():  # at random its gates are almost shut, and adapters of attention would do nothing
        for name, parameter in transformer.named_parameters():
            parameter.mul_(16.0 if "norm1" in name else 1.0)
    vae = tiny_vae(scaling_factor=0.13025)
    return AuraFlowPipeline(tokenizer, text_encoder, vae, transformer, FlowMatchEulerDiscreteScheduler(shift=1.73))
