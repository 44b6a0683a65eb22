"""Images sampled from a pipeline, each a pure function of the set's seed and its own index.

So a set depends neither on the batch size nor on the number of processes: every image has its own random generator,
which the noise of every step comes from (:mod:`stepdistill.export.generators`), and all networks process a fixed number
of rows at a time (:mod:`stepdistill.inference.rows`). On one machine the images are then equal to the last bit. Images
are rounded to bytes, as in a file, before any metric is computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.export.contract import contract_of
from stepdistill.export.generators import handed_on
from stepdistill.files.weights import naming
from stepdistill.inference.grids import to_uint8
from stepdistill.inference.rows import counted_rows, in_rows, network_of, rows_for
from stepdistill.randomness import derive_seed

ROWS = 16
"""Rows that the network processes at a time in an evaluation."""


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of images (N, C, H, W) or clips (N, C, F, H, W) as bytes, their labels (N,), and their cost."""

    pixels: Tensor
    labels: Tensor | None = None
    calls: float = 0.0
    """Network calls per image; a guided step counts two."""
    seconds: float = 0.0
    """Median over batches of the wall-clock seconds per image, without the first batch."""
    captions: Sequence[str] | None = None
    """N prompts, or texts that describe the images."""

    def __len__(self) -> int:
        return len(self.pixels)


def sample_images(
    pipeline: Any, count: int, *, seed: int = 0, batch_size: int = 100, num_classes: int | None = None,
    labels: Sequence[int] | None = None, captions: Sequence[str] | None = None, negative_prompt: str | None = None,
    precision: str = "fp32", call: Mapping[str, Any] | None = None, first: int = 0, rows: int | None = None,
    description: str = "sampling",
) -> Images:  # fmt: skip
    """Sample images ``first`` to ``first + count - 1`` of a set from a diffusers pipeline, labels in turn.

    Args:
        pipeline: takes ``generator`` (a list) and ``output_type="np"``, and ``class_labels`` or ``prompt`` if it is
            conditional.
        count: number of images.
        seed: of the whole set; image i depends on (seed, i) only.
        batch_size: images per call; changes only the speed.
        num_classes: image i gets label i modulo this; None for a pipeline without labels.
        labels: image i gets label ``labels[i modulo their number]`` instead.
        captions: image i gets the prompt ``captions[i modulo their number]``.
        negative_prompt: what guidance leads every image away from, for pipelines that accept it.
        precision: ``"bf16"`` runs the network under autocast.
        call: further arguments of the call, for example ``num_inference_steps``.
        first: index of the first image.
        rows: number of rows that the networks process at a time, padded in smaller batches, so that the batch size
            changes no bit; by default :func:`stepdistill.inference.rows.rows_for`.
        description: text of the progress bar.
    """
    pipeline.set_progress_bar_config(disable=True)
    device, stop = pipeline.device, first + count
    label_of = None if num_classes is None else cycle_labels(stop, range(num_classes) if labels is None else labels)
    prompts = None if captions is None else [captions[index % len(captions)] for index in range(first, stop)]
    pixels, seconds = [], []
    network = network_of(pipeline)
    with _named_failures(pipeline):
        rows = rows_for(pipeline) if rows is None else rows
    with counted_rows(network) as counted, in_rows(pipeline, rows), autocast(device, precision):
        for start in tqdm(range(first, stop, batch_size), desc=description, leave=False, dynamic_ncols=True):
            indices = range(start, min(start + batch_size, stop))
            condition = condition_of(
                pipeline, indices, label_of, prompts and prompts[start - first : indices.stop - first]
            )
            if negative_prompt is not None:
                condition["negative_prompt"] = [negative_prompt] * len(indices)
            batch, elapsed = _sample_batch(pipeline, indices, seed, condition, call or {})
            pixels.append(batch)
            seconds.append(elapsed / len(indices))
    sampled_labels = None if label_of is None else label_of[first:]
    per_image = statistics.median(seconds[1:] or seconds)
    return Images(torch.cat(pixels), sampled_labels, counted[0] / count, per_image, prompts)


def _sample_batch(
    pipeline: Any, indices: range, seed: int, condition: Mapping[str, Any], call: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """Sample the images or clips of these indices as bytes, and return them with the seconds that it took."""
    generators = generators_of(seed, indices)
    began = time.perf_counter()
    with handed_on(pipeline, generators), _named_failures(pipeline):
        output, *_ = pipeline(**condition, generator=generators, output_type="np", return_dict=False, **call)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    elapsed = time.perf_counter() - began
    return to_uint8(torch.from_numpy(np.asarray(output)).movedim(-1, 1)), elapsed


def generators_of(seed: int, indices: range) -> list[torch.Generator]:
    """Return the generator of every image of a set, a function of the set's seed and the image's index."""
    return [torch.Generator().manual_seed(derive_seed(seed, index)) for index in indices]


def _named_failures(pipeline: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a call that fails names the folder of the pipeline, if it was opened from one.

    Settings that fit their weights may still not work together; only the call of the networks tells.
    """
    folder = getattr(pipeline, "name_or_path", None)
    return naming(Path(folder), "a call of it fails") if folder else contextlib.nullcontext()


def condition_of(pipeline: Any, indices: range, labels: Tensor | None, prompts: Sequence[str] | None) -> dict[str, Any]:
    """Return the arguments of a call for the images ``indices``: labels, prompts, and the batch size if it is accepted.

    Raises:
        ValueError: if a text-to-image pipeline has no captions, or another pipeline has some.
    """
    check_captions(pipeline, prompts)
    accepted = inspect.signature(type(pipeline).__call__).parameters
    condition: dict[str, Any] = {"batch_size": len(indices)} if "batch_size" in accepted else {}
    if labels is not None:
        condition["class_labels"] = labels[indices]
    if prompts is not None:
        condition["prompt"] = list(prompts)
    return condition


def check_captions(pipeline: Any, captions: Sequence[str] | None) -> None:
    """Raise ``ValueError`` if a text-to-image pipeline has no captions, or another pipeline has some."""
    takes_text = "prompt" in inspect.signature(type(pipeline).__call__).parameters
    if takes_text == (captions is not None):
        return
    expected, found = ("a file of prompts, or images with captions", "none") if takes_text else ("none", "some")
    raise ValueError(f"captions: {type(pipeline).__name__}: expected {expected}, got {found}")


def cycle_labels(count: int, labels: Sequence[int]) -> Tensor:
    """Return labels in turn, (count,)."""
    return torch.tensor(list(labels))[torch.arange(count) % len(labels)]


def class_count(pipeline: Any) -> int | None:
    """Return the number of class labels of a pipeline; None if it takes none."""
    if "class_labels" not in inspect.signature(type(pipeline).__call__).parameters:
        return None
    if (num_classes := contract_of(pipeline).num_classes) is not None:
        return num_classes  # stock pipelines do not know which label of the network is the null class
    config = network_of(pipeline).config
    embedded = config.get("num_class_embeds", config.get("num_embeds_ada_norm"))
    null_class = pipeline.config.get("null_class")
    return embedded if null_class is None or embedded is None else embedded - 1


def autocast(device: torch.device, precision: str) -> Any:
    """Return a context of autocast to bfloat16, or one that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
