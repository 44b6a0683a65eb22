"""One pass over a set of images, in chunks that are shared out, kept, and put together in the order of the images.

A chunk is :data:`CHUNK` images by index, whoever makes it. Each process takes every n-th; a finished chunk is written
to the work folder, whole or not at all, so that an interrupted evaluation goes on where it stopped, also with another
number of processes. Only features are kept: thirty thousand large images would not fit in memory.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.assets import EMBEDDED
from stepdistill.config import fingerprint_json
from stepdistill.data.base import DataConfig
from stepdistill.data.decoding import read_pixels
from stepdistill.data.listing import list_samples
from stepdistill.data.text import read_text
from stepdistill.evaluation.image_set import ImageFiles
from stepdistill.inference.sampling import Images, class_count, sample_images

CHUNK = 500


class Source(abc.ABC):
    """A set of images that can be had in any part, the same every time."""

    count: int

    @abc.abstractmethod
    def take(self, indices: range) -> Images:
        """The images at ``indices``."""


class Sampled(Source):
    """What a pipeline paints.

    Args:
        pipeline: see :func:`stepdistill.inference.sampling.sample_images`, as for the rest.
        count: images of the set.
        size: images are resized (short side) and cropped to a square of this side.
        settings: keyword arguments of :func:`~stepdistill.inference.sampling.sample_images`.
    """

    def __init__(self, pipeline: Any, count: int, *, size: int | None = None, **settings: Any) -> None:
        self.pipeline, self.count, self.size, self.settings = pipeline, count, size, settings
        self.num_classes = class_count(pipeline)

    def take(self, indices: range) -> Images:
        return resized(
            sample_images(
                self.pipeline, len(indices), first=indices.start, num_classes=self.num_classes, **self.settings
            ),
            self.size,
        )


class OnDisk(Source):
    """Images that were generated elsewhere."""

    def __init__(self, files: ImageFiles) -> None:
        self.files, self.count = files, len(files)

    def take(self, indices: range) -> Images:
        return self.files.read(indices)


def resized(images: Images, size: int | None) -> Images:
    """Images with the short side at ``size`` (bicubic, antialiased, as files are), cropped at the centre."""
    if size is None or images.pixels.shape[-2:] == (size, size):
        return images
    arrays = images.pixels.permute(0, 2, 3, 1).numpy()
    pixels = np.stack([read_pixels(array, array.shape[2], (size, size)) for array in arrays])
    return dataclasses.replace(images, pixels=torch.from_numpy(pixels))


def collect(
    source: Source, embed: Callable[[Images], Mapping[str, Tensor]], *, work: Path | None = None, identity: Any = None
) -> dict[str, Tensor]:
    """What ``embed`` makes of all images of ``source``, (N, ...) each, in the order of their indices.

    Beside it: ``labels`` where there are some, and by chunk ``calls`` (network calls an image), ``seconds`` an image,
    and ``images`` (their number).

    Args:
        source: the images.
        embed: tensors whose rows are the images given.
        work: folder for finished chunks; None keeps nothing.
        identity: all that the chunks depend on: chunks of another identity lie in another sub-folder.
    """
    folder = None if work is None else work / fingerprint_json(identity)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "identity.json").write_text(json.dumps(identity, indent=2, default=str) + "\n", encoding="utf-8")
    state = PartialState()
    starts = list(range(0, source.count, CHUNK))
    mine = [
        (start, make_chunk(source, embed, start, folder))
        for start in starts[state.process_index :: state.num_processes]
    ]
    chunks = dict(gather_object(mine))
    return {key: torch.cat([chunks[start][key] for start in starts]) for key in chunks[0]}


def make_chunk(
    source: Source, embed: Callable[[Images], Mapping[str, Tensor]], start: int, folder: Path | None
) -> dict[str, Tensor]:
    """One chunk: read where it is finished, else made, and kept where there is a folder."""
    path = None if folder is None else folder / f"chunk-{start:08d}.safetensors"
    if path is not None and path.is_file():
        try:
            return load_file(path)
        except SafetensorError:
            path.unlink()  # the disk lost part of it: it is made again
    images = source.take(range(start, min(start + CHUNK, source.count)))
    chunk = {name: tensor.contiguous() for name, tensor in embed(images).items()}
    if images.labels is not None:
        chunk["labels"] = images.labels
    cost = {"calls": images.calls, "seconds": images.seconds, "images": len(images)}
    chunk |= {name: torch.tensor([value], dtype=torch.float64) for name, value in cost.items()}
    if path is not None:
        partial = path.with_suffix(".partial")
        save_file(chunk, partial)
        partial.replace(path)
    return chunk


def read_captions(path: str, count: int) -> Sequence[str]:
    """``count`` captions: of a text file, one a line, or of images with captions, as ``data.path`` takes them.

    Raises:
        ValueError: no such file, empty lines, or too few of them: a caption used twice is another protocol.
    """
    file = EMBEDDED.get(path, Path(path))
    if file.is_dir() or file.suffix in (".npz", ".tar"):
        captions = list_samples(DataConfig(name="images", path=str(file))).captions
        if captions is None:
            raise ValueError(f"captions: {path} has images without texts; wanted a metadata.jsonl with 'text'")
        lines = [str(caption) for caption in captions]
    elif file.is_file():
        lines = read_text(file).splitlines()
    else:
        raise ValueError(f"captions: no file or folder {path!r}")
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty:
        raise ValueError(f"captions: {path}: line {empty[0]} is empty")
    if len(lines) < count:
        raise ValueError(f"captions: {path} has {len(lines)}, wanted {count}: one an image")
    return lines[:count]
