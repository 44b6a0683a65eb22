"""A set of images that the processes of ``accelerate launch`` make together: the same images as one would make."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from stepdistill.inference.sampling import Images


def open_state() -> PartialState:
    """Return the processes, each with its device; without a launcher it is one."""
    return PartialState(cpu=not torch.accelerator.is_available())  # or processes on CPUs would not find each other


def own_part(count: int) -> range:
    """Return the images of a set of ``count`` that this process makes: consecutive ones."""
    state = open_state()
    first, stop = (count * rank // state.num_processes for rank in (state.process_index, state.process_index + 1))
    return range(first, stop)


def together(part: Sequence[Images]) -> Images:
    """Return the whole set in every process, of the parts of all; all call it, with an image set or none."""
    parts: list[Images] = gather_object(list(part))
    if len(parts) == 1:
        return parts[0]
    labels = [images.labels for images in parts if images.labels is not None]
    captions: list[str] = []
    for images in parts:
        captions.extend(images.captions or ())
    calls = sum(images.calls * len(images) for images in parts) / sum(map(len, parts))
    return Images(
        torch.cat([images.pixels for images in parts]), torch.cat(labels) if labels else None, calls,
        statistics.median(images.seconds for images in parts), captions or None,
    )  # fmt: skip
