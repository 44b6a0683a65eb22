"""A fixed number of rows in every call of a pipeline's networks, so that no image depends on its batch.

The number of rows of a batch selects the kernels of a linear layer or a convolution, and these the last bits. So text
encoders, the denoising network and the decoder see always the same number of rows: a longer batch is cut into pieces,
and a shorter one is filled up with copies of its last row.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from stepdistill.export.contract import contract_of
from stepdistill.export.generators import patched

SHARED = ("img_ids", "txt_ids", "image_rotary_emb")
"""Arguments of transformers that all rows share, whatever their length."""

CONDITIONING = ("text_encoder", "text_encoder_2", "text_encoder_3", "condition_embedding")
"""Components of a pipeline that make conditions."""

MOST_ROWS = 16

USUAL_SIDE = 1024
"""Side in pixels of the images of a pipeline that names none."""

PLACES = 64 * 64
"""Places (height times width) that the network sees at a time: a latent of 512 x 512 pixels."""

PIXELS = 512 * 512
"""Pixels that are decoded at a time."""


def network_of(pipeline: Any) -> Any:
    """Return the denoising network of a pipeline."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def rows_for(pipeline: Any) -> int:
    """Return how many rows the network of a pipeline sees at a time, by the size of its samples: 1 to 16.

    A single image then costs about as much as one of 512 x 512 pixels, or what it costs alone.
    """
    return min(_rows_within(PLACES, places_of(pipeline)), decoder_rows(pipeline))


def decoder_rows(pipeline: Any) -> int:
    """Return how many images are decoded at a time: 1 to 16."""
    factor = 1 if getattr(pipeline, "vae", None) is None else latent_side(pipeline)
    return _rows_within(PIXELS, places_of(pipeline) * factor**2)


def latent_side(pipeline: Any) -> int:
    """Return the side in pixels of the square that one latent covers."""
    return getattr(pipeline, "vae_scale_factor", 0) or getattr(pipeline, "vae_scale_factor_spatial", 8)


def places_of(pipeline: Any) -> int:
    """Return the height times the width of what the network sees, by default of a call."""
    config = getattr(network_of(pipeline), "config", {})
    size = config.get("sample_size") or getattr(pipeline, "default_sample_size", None) or called_size(pipeline)
    height, width = (size, size) if isinstance(size, int) else size
    return height * width


def called_size(pipeline: Any) -> tuple[int, int]:
    """Return the (height, width) in latents of a call's images, its frames below each other; (1, 1) if none is known.

    Networks of Z-Image and Wan do not name their size: the contract does, or the call's own defaults.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "height" not in parameters:
        return 1, 1
    usual = {name: parameter.default for name, parameter in parameters.items()} | dict(contract_of(pipeline).call)
    frames = ((usual.get("num_frames") or 1) - 1) // getattr(pipeline, "vae_scale_factor_temporal", 1) + 1
    height, width = ((usual[name] or USUAL_SIDE) // latent_side(pipeline) for name in ("height", "width"))
    return frames * height, width


def _rows_within(budget: int, row: int) -> int:
    return min(max(budget // row, 1), MOST_ROWS)


@contextlib.contextmanager
def in_rows(pipeline: Any, rows: int) -> Iterator[None]:
    """Run the networks of a pipeline on a fixed number of rows at a time inside the context.

    Args:
        pipeline: a diffusers pipeline.
        rows: of the denoising network. Prompts are encoded one by one, and images decoded by their size.
    """
    with contextlib.ExitStack() as stack:
        for name in CONDITIONING:
            if (module := getattr(pipeline, name, None)) is not None:
                stack.enter_context(fixed_rows(module, 1))
        stack.enter_context(fixed_rows(network_of(pipeline), rows))
        if (vae := getattr(pipeline, "vae", None)) is not None:
            stack.enter_context(fixed_rows(vae, decoder_rows(pipeline), "decode"))
        yield


@contextlib.contextmanager
def fixed_rows(module: torch.nn.Module, rows: int, method: str = "forward") -> Iterator[None]:
    """Run a method of a module on exactly ``rows`` rows at a time inside the context.

    Arguments of the batch's length are cut into pieces, and the outputs are concatenated.
    """
    original = getattr(module, method)

    @functools.wraps(original)  # two-time pipelines look the arguments' names up
    def in_pieces(*args: Any, **kwargs: Any) -> Any:
        batch = batch_of(args, kwargs)
        per_row = {name: value for name, value in kwargs.items() if name not in SHARED}
        outputs = []
        for start in range(0, batch, rows):
            cut = functools.partial(rows_at, index=torch.arange(start, start + rows).clamp(max=batch - 1), batch=batch)
            cut_args, cut_kwargs = tree_map(cut, (args, per_row), is_leaf=is_list)
            outputs.append(original(*cut_args, **{**kwargs, **cut_kwargs}))
        return tree_map(lambda *leaves: join(leaves, batch), *outputs, is_leaf=is_list)

    with patched(module, method, in_pieces):
        yield


def rows_at(leaf: Any, index: Tensor, batch: int) -> Any:
    """Return the rows ``index`` (rows,) of an argument of ``batch`` rows, and any other argument as it is."""
    if is_list(leaf):  # Z-Image takes a list of images and one of prompts
        return [leaf[row] for row in index.tolist()] if len(leaf) == batch else leaf
    is_batch = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch
    return leaf[index.to(leaf.device)] if is_batch else leaf


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the number of rows of a call: the length of its first tensor, or of the one that is named for it."""
    for name in ("sample", "hidden_states"):
        if name in kwargs:
            return len(kwargs[name])
    leaves, _ = tree_flatten((args, kwargs), is_leaf=is_list)
    return next(len(leaf) for leaf in leaves if is_list(leaf) or (isinstance(leaf, Tensor) and leaf.ndim > 0))


def is_list(node: Any) -> bool:
    """Return whether a part of a network's arguments or outputs is a list, of one thing a row."""
    return type(node) is list


def join(leaves: tuple[Any, ...], batch: int) -> Any:
    """Return the outputs of pieces as one of ``batch`` rows; what is no tensor is that of the first."""
    first = leaves[0]
    if is_list(first):
        return list(itertools.chain(*leaves))[:batch]
    return torch.cat(leaves)[:batch] if isinstance(first, Tensor) and first.ndim > 0 else first


@contextlib.contextmanager
def counted_rows(network: torch.nn.Module) -> Iterator[list[int]]:
    """Count the images that pass through a network, in a list of one number."""
    rows = [0]

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        del module
        rows[0] += batch_of(args, kwargs)

    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()
