"""Train a small CLIP (Radford et al., arXiv 2103.00020) on images and captions, and its tokenizer.

Its text half conditions a text-to-image teacher; a second CLIP, of another seed, measures it: see
:mod:`stepdistill.pretraining.text_to_image`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stepdistill.pretraining.fit import FitConfig, fit

SHIFT = 3
"""Images are moved by up to this many pixels, so that the position of a pixel does not identify an image."""


def train_tokenizer(captions: Sequence[str], size: int, length: int) -> CLIPTokenizer:
    """Train a byte-pair tokenizer like CLIP's on captions.

    It reads any text: an unknown word is split into known pieces, in the last resort into its bytes.

    Args:
        captions: texts to learn from.
        size: largest number of tokens in the vocabulary; 512 are the bytes, inside a word and at its end.
        length: largest number of tokens in a prompt.
    """
    letters = list(bytes_to_unicode().values())
    last = [letter + "</w>" for letter in letters]
    words = [*letters, *last, "<|startoftext|>", "<|endoftext|>"]
    untrained = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=length)
    trained = untrained.train_new_from_iterator(captions, size - len(last), show_progress=False)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for letter in last:
        vocabulary.setdefault(letter, len(vocabulary))
    return CLIPTokenizer(vocabulary, [tuple(pair) for pair in model["merges"]], model_max_length=length)


def train_clip(
    images: Tensor,
    captions: Sequence[str],
    tokenizer: CLIPTokenizer,
    config: FitConfig,
    accelerator: Accelerator,
    log: Path,
) -> CLIPModel:
    """Train a CLIP on ``images`` (N, C, H, W) in [-1, 1] and captions; ``config.model`` has a section for each half."""
    tokens = tokenizer(list(captions), padding="longest", truncation=True, return_tensors="pt")
    torch.manual_seed(config.seed)
    clip = CLIPModel(clip_config(config.model, tokenizer))

    def loss(network: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        device = accelerator.device
        pixels = shifted(images[index], generator).to(device)
        words = {name: value[index].to(device) for name, value in tokens.items()}
        return network(pixel_values=pixels, return_loss=True, **words).loss

    return fit(clip, loss, count=len(images), config=config, accelerator=accelerator, log=log).eval()


def clip_config(model: dict[str, Any], tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Return the configuration ``model`` with the sizes and special tokens of a tokenizer."""
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(**{**model, "text_config": {**model["text_config"], **text}})


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (B, C, H, W), each moved by up to ``SHIFT`` pixels across and down, with white margins."""
    height, width = images.shape[2:]
    padded = nn.functional.pad(images, (SHIFT,) * 4, value=1.0)
    corners = torch.randint(2 * SHIFT + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)])


def image_processor(size: int) -> CLIPImageProcessor:
    """Return the processor that makes an image the CLIP's input: ``size`` x ``size``, values in [-1, 1]."""
    square = {"height": size, "width": size}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessor(size=square, crop_size=square, image_mean=half, image_std=half, do_center_crop=False)
