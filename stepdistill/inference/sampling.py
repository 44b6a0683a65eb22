"""Images sampled from a pipeline, each a pure function of the set's seed and its own index.

So a set depends neither on the batch size nor on how many processes share the work. Every image has a random generator
of its own, and the denoising network sees a fixed number of rows at a time (the kernels of a linear layer or a
convolution are chosen by the number of rows, and the last bits with them). On one machine the images of a pixel
pipeline are then equal to the last bit. Text encoders and decoders see batches as they come: fewer than one in 1,000
values of a latent pipeline may be one level off. Images are rounded to bytes, as a file would be, before any metric
sees them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from stepdistill.inference.grids import to_uint8
from stepdistill.randomness import derive_seed

ROWS = 16
"""Rows that the network sees at a time while it is measured."""


SHARED = ("img_ids", "txt_ids")
"""Arguments of transformers that all rows share, however long they are."""


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of images as bytes (N, C, H, W), the labels (N,) that were asked for, and what making them cost."""

    pixels: Tensor
    labels: Tensor | None = None
    calls: float = 0.0
    """Network calls an image; a guided call counts as two."""
    seconds: float = 0.0
    """Median over batches of the wall-clock seconds an image takes, the first batch left out."""
    captions: Sequence[str] | None = None
    """N texts that were asked for, or that describe the images."""

    def __len__(self) -> int:
        return len(self.pixels)


def sample_images(
    pipeline: Any,
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 100,
    num_classes: int | None = None,
    labels: Sequence[int] | None = None,
    captions: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    precision: str = "fp32",
    call: Mapping[str, Any] | None = None,
    first: int = 0,
    rows: int | None = None,
    description: str = "sampling",
) -> Images:
    """Sample images ``first`` to ``first + count - 1`` of a set from a diffusers pipeline, labels in turn.

    Args:
        pipeline: takes ``generator`` (a list) and ``output_type="np"``; ``class_labels`` or ``prompt`` where it is
            conditional.
        count: how many images.
        seed: of the whole set; image i depends on (seed, i) alone.
        batch_size: images a call; changes nothing but the speed.
        num_classes: image i gets label i modulo this; None for a pipeline without labels.
        labels: image i gets label ``labels[i modulo their number]`` instead.
        captions: image i gets the prompt ``captions[i modulo their number]``.
        negative_prompt: what every image is led away from, by a pipeline that takes it.
        precision: ``"bf16"`` runs the network under autocast.
        call: further arguments of the call, for example ``num_inference_steps``.
        first: index of the first image.
        rows: if given, the network sees exactly so many rows at a time, filled up where a batch has fewer: then the
            batch size changes no bit of what a pixel pipeline makes. None takes a batch as it comes, and a few pixels
            in 100,000 may be one level off, as with a latent pipeline's encoders and decoder in any case.
        description: what the progress bar says.
    """
    pipeline.set_progress_bar_config(disable=True)
    device, stop = pipeline.device, first + count
    asked = None if num_classes is None else asked_labels(stop, range(num_classes) if labels is None else labels)
    prompts = None if captions is None else [captions[index % len(captions)] for index in range(first, stop)]
    pixels, seconds = [], []
    network = network_of(pipeline)
    in_pieces = contextlib.nullcontext() if rows is None else fixed_rows(network, rows)
    with counted_rows(network) as counted, in_pieces, autocast(device, precision):
        for start in tqdm(range(first, stop, batch_size), desc=description, leave=False, dynamic_ncols=True):
            indices = range(start, min(start + batch_size, stop))
            generators = [torch.Generator("cpu").manual_seed(derive_seed(seed, index)) for index in indices]
            condition = condition_of(
                pipeline, indices, asked, prompts and prompts[start - first : indices.stop - first]
            )
            if negative_prompt is not None:
                condition["negative_prompt"] = [negative_prompt] * len(indices)
            began = time.perf_counter()
            output = pipeline(**condition, generator=generators, output_type="np", **(call or {})).images
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append((time.perf_counter() - began) / len(indices))
            pixels.append(to_uint8(torch.from_numpy(np.asarray(output)).permute(0, 3, 1, 2)))
    labels_of = None if asked is None else asked[first:]
    return Images(torch.cat(pixels), labels_of, counted[0] / count, statistics.median(seconds[1:] or seconds), prompts)


def condition_of(pipeline: Any, indices: range, labels: Tensor | None, prompts: Sequence[str] | None) -> dict[str, Any]:
    """The arguments that ask a pipeline for the images ``indices``: labels, prompts, and a batch size if it takes one.

    Raises:
        ValueError: a text-to-image pipeline without captions, or captions for another kind.
    """
    taken = inspect.signature(type(pipeline).__call__).parameters
    if ("prompt" in taken) != (prompts is not None):
        found, wanted = ("no captions", "some") if prompts is None else ("captions", "none")
        raise ValueError(f"captions: {type(pipeline).__name__} wants {wanted}; found {found}")
    condition: dict[str, Any] = {"batch_size": len(indices)} if "batch_size" in taken else {}
    if labels is not None:
        condition["class_labels"] = labels[indices]
    if prompts is not None:
        condition["prompt"] = list(prompts)
    return condition


def asked_labels(count: int, labels: Sequence[int]) -> Tensor:
    """Labels in turn, (count,)."""
    return torch.tensor(list(labels))[torch.arange(count) % len(labels)]


def network_of(pipeline: Any) -> Any:
    """The denoising network of a pipeline."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def class_count(pipeline: Any) -> int | None:
    """How many classes may be asked of a pipeline; None where it takes no labels."""
    if "class_labels" not in inspect.signature(type(pipeline).__call__).parameters:
        return None
    if (told := getattr(pipeline, "contract_classes", None)) is not None:
        return told  # stock pipelines do not know that one label of the network's means "none"
    config = network_of(pipeline).config
    embedded = config.get("num_class_embeds", config.get("num_embeds_ada_norm"))
    null_class = pipeline.config.get("null_class")
    return embedded if null_class is None or embedded is None else embedded - 1


@contextlib.contextmanager
def fixed_rows(network: torch.nn.Module, rows: int) -> Iterator[None]:
    """Within, ``network`` runs on exactly ``rows`` rows at a time, the last ones filled up by repeating a row.

    Every tensor among the arguments whose length is the batch's is cut; every tensor of the output is put together.
    """
    original = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        batch = len(args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"])

        def piece(start: int) -> Any:
            index = torch.arange(start, start + rows).clamp(max=batch - 1)

            def cut(leaf: Any) -> Any:
                is_batch = isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch
                return leaf[index.to(leaf.device)] if is_batch else leaf

            per_row = {name: value for name, value in kwargs.items() if name not in SHARED}
            cut_args, cut_kwargs = tree_map(cut, (args, per_row))
            return original(*cut_args, **{**kwargs, **cut_kwargs})

        outputs = [piece(start) for start in range(0, batch, rows)]
        return tree_map(lambda *leaves: torch.cat(leaves)[:batch], *outputs)

    network.forward = forward
    try:
        yield
    finally:
        del network.forward


@contextlib.contextmanager
def counted_rows(network: torch.nn.Module) -> Iterator[list[int]]:
    """Counts the images that pass through a network, in a list of one number."""
    rows = [0]

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        del module
        first = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        rows[0] += len(first)

    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def autocast(device: torch.device, precision: str) -> Any:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
