"""Prompts of latent families: examples, masks, and how many tokens are read."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stepdistill.batch import Cond


def warn_too_long(tokenizer: Any, texts: Sequence[str], *, limit: int, what: str = "captions") -> None:
    """Count the texts that are longer than the encoder reads, and warn if there are any.

    Args:
        tokenizer: of the text encoder.
        texts: captions or prompts.
        limit: tokens that it reads.
        what: they are called.
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
    """Of (prompt, its mask, negative prompt, its mask), as an ``encode_prompt`` returns them, the condition."""
    prompt, mask = embedded[2:] if null else embedded[:2]
    return {"encoder_hidden_states": prompt.float(), "encoder_attention_mask": mask}


def prompt_reader(pipe: Any, call: Mapping[str, Any]) -> tuple[Any, int]:
    """The tokenizer that reads most of a prompt in a call of the pipeline (its last), and how many tokens it reads."""
    names = ("tokenizer_3", "tokenizer_2", "tokenizer")
    tokenizer = next(part for name in names if (part := getattr(pipe, name, None)) is not None)
    length = call.get("max_sequence_length")
    if length is None and "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters:
        length = default_of(pipe, "max_sequence_length")
    return tokenizer, min(length or tokenizer.model_max_length, tokenizer.model_max_length)


def default_of(pipe: Any, name: str) -> Any:
    """What a call of the pipeline takes for an argument that is not given."""
    return inspect.signature(type(pipe).__call__).parameters[name].default
