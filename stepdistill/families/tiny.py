"""Random miniatures of the parts of pipelines, for tests without a download."""

from __future__ import annotations

import itertools
from typing import Any


def tiny_gemma(width: int) -> tuple[Any, Any]:
    """Return a tokenizer of letters and their pairs, made in memory, and a random Gemma 2 for it."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    pairs = list(itertools.product("abcdefghijklmnopqrstuvwxyz\u2581", repeat=2))
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789,.'"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, *("".join(pair) for pair in pairs)]
    tokenizer = GemmaTokenizer({piece: i for i, piece in enumerate(pieces)}, pairs)
    config = Gemma2Config(
        vocab_size=len(pieces), hidden_size=width, intermediate_size=width, num_hidden_layers=1, head_dim=8,
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
