"""Prompts of latent families: examples, masks, and the number of tokens that are read."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepdistill.batch import Cond


def warn_too_long(tokenizer: Any, texts: Sequence[str], *, limit: int, what: str = "captions") -> None:
    """Warn if texts are longer than the text encoder reads.

    Args:
        tokenizer: of the text encoder.
        texts: captions or prompts.
        limit: number of tokens that it reads.
        what: name of the texts in the warning.
    """
    too_long = [text for text in texts if len(tokenizer(text).input_ids) > limit]
    if too_long:
        warnings.warn(
            f"{len(too_long)} of {len(texts)} {what} are longer than the text encoder's {limit} tokens; their "
            f"ends are cut. The first: {too_long[0][:60]!r}...",
            stacklevel=3,
        )


EXAMPLE_PROMPTS = (
    "a red apple on a wooden table",
    "a watercolour of a lighthouse at dawn",
    "a photo of a cat asleep on a bookshelf",
    "a street in the rain at night, neon signs",
    "an astronaut riding a horse",
    "a bowl of ramen, seen from above",
    "a mountain lake in autumn",
    "a portrait of an old fisherman, oil on canvas",
)


def masked(embedded: Sequence[Tensor], null: bool) -> Cond:
    """Return the condition out of (prompt, its mask, negative prompt, its mask), as ``encode_prompt`` returns them."""
    prompt, mask = embedded[2:] if null else embedded[:2]
    return {"encoder_hidden_states": prompt.float(), "encoder_attention_mask": mask}


def padded(rows: Sequence[Tensor], length: int) -> Cond:
    """Return embeddings (n, D) of prompts with n of their own padded with zeros to ``length``, and their mask."""
    counts = torch.tensor([len(row) for row in rows], device=rows[0].device)
    filled = [pad(row.float(), (0, 0, 0, length - len(row))) for row in rows]
    mask = torch.arange(length, device=counts.device) < counts[:, None]
    return {"encoder_hidden_states": torch.stack(filled), "encoder_attention_mask": mask}


def prompt_reader(pipe: Any, call: Mapping[str, Any]) -> tuple[Any, int]:
    """Return the tokenizer that reads most of a prompt (the pipeline's last), and its limit in tokens."""
    names = ("tokenizer_3", "tokenizer_2", "tokenizer")
    tokenizer = next(part for name in names if (part := getattr(pipe, name, None)) is not None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one for texts
    length = call.get("max_sequence_length")
    if length is None and "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters:
        length = default_of(pipe, "max_sequence_length")
    return tokenizer, min(length or tokenizer.model_max_length, tokenizer.model_max_length)


def default_of(pipe: Any, name: str) -> Any:
    """Return the default of an argument of the pipeline's call."""
    return inspect.signature(type(pipe).__call__).parameters[name].default
