"""The samples beside a result, ``<result>-samples.npz``: what the page shows of every row on the same conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stepdistill.files.arrays import read_arrays
from stepdistill.files.writing import atomic_write
from stepdistill.inference.grids import to_uint8

COLUMNS = 8
"""Images of a row."""
SIDE = 256
"""Longest side in pixels of an image; larger ones are made smaller."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images of several rows on the same seeds and conditions.

    Attributes:
        images: (rows, columns, H, W, C) uint8; C is 1 or 3.
        rows: the names of the rows.
        conditions: prompt or class of every column; empty for a teacher without conditions.
    """

    images: np.ndarray
    rows: list[str]
    conditions: list[str]

    @classmethod
    def of(cls, pictures: Mapping[str, Tensor], conditions: Sequence[str]) -> Samples:
        """Return the first images of some rows, (N, C, H, W) in [0, 1] by name, with the conditions of N images."""
        columns = min(COLUMNS, *(len(images) for images in pictures.values()))
        found = [_small(images[:columns]) for images in pictures.values()]
        return cls(np.stack(found), list(pictures), list(conditions[:columns]))

    def write(self, path: Path) -> None:
        """Write the file as a whole."""
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file, images=self.images, rows=np.array(self.rows), conditions=np.array(self.conditions, dtype=str)
            )

    @classmethod
    def read(cls, path: Path) -> Samples:
        """Read a file.

        Raises:
            ValueError: naming the file, if it is no such file.
        """
        found = read_arrays(path, ("images", "rows", "conditions"))
        images, rows, conditions = (found.get(name, np.zeros(0)) for name in ("images", "rows", "conditions"))
        if images.ndim != 5 or images.dtype != np.uint8 or images.shape[4] not in (1, 3) or 0 in images.shape:
            raise ValueError(f"{path}: images: expected bytes (rows, columns, H, W, 1 or 3), got {_kind(images)}")
        if rows.dtype.kind != "U" or rows.shape != images.shape[:1]:
            raise ValueError(f"{path}: rows: expected {len(images)} names, got {_kind(rows)}")
        if conditions.dtype.kind != "U" or conditions.shape not in ((0,), images.shape[1:2]):
            raise ValueError(f"{path}: conditions: expected {images.shape[1]} texts or none, got {_kind(conditions)}")
        return cls(images, rows.tolist(), conditions.tolist())

    def picture(self, row: int, column: int) -> Image.Image:
        """Return one image."""
        array = self.images[row, column]
        return Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])


def conditions_of(count: int, captions: Sequence[str] | None, num_classes: int | None) -> list[str]:
    """Return the conditions of the first ``count`` samples of a benchmark, as they are shown: prompts, or classes."""
    if captions is not None:
        return list(captions[:count])
    return [] if num_classes is None else [f"class {index % num_classes}" for index in range(count)]


def _small(images: Tensor) -> np.ndarray:
    """Return images (N, C, H, W) as bytes (N, H, W, 1 or 3), none longer than :data:`SIDE`."""
    images = images[:, :3] if images.shape[1] == 3 else images[:, :1]
    scale = SIDE / max(images.shape[2:])
    if scale < 1:
        images = F.interpolate(images, scale_factor=scale, mode="bicubic", antialias=True)
    return to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


def first_places(captions: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return the place of each wanted caption; 0 if there is no such caption."""
    places = dict(zip(captions, range(len(captions)), strict=True))
    return [places.get(caption, 0) for caption in wanted]


def places_by_class(labels: Tensor, number: int, count: int) -> list[int]:
    """Return places whose classes are 0, 1, ..., number - 1, 0, 1, ...

    A class with few images is shown by the same ones again, and one without by any.
    """
    places = []
    for index in range(count):
        of_class = (labels == index % number).nonzero().flatten().tolist() or range(len(labels))
        places.append(of_class[index // number % len(of_class)])
    return places
