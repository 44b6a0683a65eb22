"""Train a small CLIP (Radford et al., arXiv 2103.00020) on images and captions, and its tokenizer.

Its text half conditions a text-to-image teacher; a second CLIP, of another seed, measures it: see
:mod:`stepdistill.pretraining.text_to_image`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stepdistill.data.columns import Texts
from stepdistill.pretraining.fit import FitConfig, fit


class CaptionTokens:
    """The tokens of one or several captions an image, of which each visit draws one, all with the same chance.

    Args:
        tokenizer: of a CLIP.
        captions: of each image.
    """

    def __init__(self, tokenizer: CLIPTokenizer, captions: Sequence[Texts]) -> None:
        self.tokenizer = tokenizer
        self._counts = torch.tensor([len(texts) for texts in captions])
        self._starts = self._counts.cumsum(0) - self._counts
        self._ids = self.encode(list(itertools.chain.from_iterable(captions)))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the tokens (N, length) of texts, padded and cut to the tokenizer's length."""
        ids: Tensor = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        return ids

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Return the tokens (B, length) of a caption of each of the images ``index`` (B,)."""
        place = torch.rand(len(index), generator=generator) * self._counts[index]
        return self._ids[self._starts[index] + place.long()]

    def mask(self, ids: Tensor) -> Tensor:
        """Return 1 for the tokens up to the first end, 0 for the padding, (B, length)."""
        ends = (ids == self.tokenizer.eos_token_id).int().argmax(1)
        return (torch.arange(ids.shape[1]) <= ends[:, None]).long()


def train_tokenizer(captions: Sequence[str], size: int, length: int) -> CLIPTokenizer:
    """Train a byte-pair tokenizer like CLIP's on captions.

    It reads any text: an unknown word is split into known pieces, in the last resort into its bytes. The same captions
    give the same tokens.

    Args:
        captions: texts to learn from.
        size: largest number of tokens in the vocabulary; 512 are the bytes, inside a word and at its end.
        length: largest number of tokens in a prompt.
    """
    letters = list(bytes_to_unicode().values())
    last = [letter + "</w>" for letter in letters]
    words = [*letters, *last, "<|startoftext|>", "<|endoftext|>"]
    untrained = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=length)
    # told the ends of words beforehand, the trainer does not number them in the order of a hash table
    trained = untrained.train_new_from_iterator(captions, size, new_special_tokens=last, show_progress=False)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    return CLIPTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]], model_max_length=length)


def train_clip(
    images: Tensor, captions: CaptionTokens, config: FitConfig, shift: int, accelerator: Accelerator, log: Path
) -> CLIPModel:
    """Train a CLIP on images and captions.

    Args:
        images: (N, C, H, W) in [-1, 1].
        captions: one or several an image.
        config: of the training; its ``model`` has a section for each half.
        shift: largest number of pixels by which images are moved, see :func:`shifted`.
        accelerator: device, precision and processes.
        log: file for the loss.
    """
    torch.manual_seed(config.seed)
    clip = CLIPModel(clip_config(config.model, captions.tokenizer))

    def loss(network: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        device = accelerator.device
        pixels = shifted(images[index], shift, generator).to(device)
        ids = captions.draw(index, generator)
        mask = captions.mask(ids)
        return network(
            pixel_values=pixels, input_ids=ids.to(device), attention_mask=mask.to(device), return_loss=True
        ).loss

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


def shifted(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Return images (B, C, H, W), each moved by up to ``shift`` pixels across and down, with white margins.

    Then the position of a pixel does not identify an image.
    """
    height, width = images.shape[2:]
    padded = nn.functional.pad(images, (shift,) * 4, value=1.0)
    corners = torch.randint(2 * shift + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)])


def image_processor(size: int) -> CLIPImageProcessor:
    """Return the processor that makes an image the CLIP's input: ``size`` x ``size``, values in [-1, 1]."""
    square = {"height": size, "width": size}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessor(size=square, crop_size=square, image_mean=half, image_std=half, do_center_crop=False)
