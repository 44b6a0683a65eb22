"""Images, labels and captions in an ``.npz``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from stepdistill.data.columns import Column, Texts, read_texts
from stepdistill.files.arrays import array_headers, read_arrays
from stepdistill.files.words import nearest

_OURS = {"images": "images", "labels": "labels", "captions": "captions"}
_ADM = {"images": "arr_0", "labels": "arr_1", "captions": "captions"}
"""Names of the arrays in ``.npz`` files of ours, and in those that ADM's (guided-diffusion's) samplers write."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """The samples of an ``.npz``."""

    images: np.ndarray
    """(N, H, W, C) uint8."""
    labels: np.ndarray | None
    """(N,) int, if there are some."""
    no_labels: str | None
    """Why there are none, although there is an array of them."""
    captions: Column[Texts]


def read_archive(path: Path) -> Archive:
    """Return the arrays of an ``.npz``.

    Raises:
        ValueError: naming the file: if it is damaged, asks for more memory than it may, or holds no uint8 images.
    """
    headers = array_headers(path)
    names = _ADM if "arr_0" in headers and "images" not in headers else _OURS
    if names["images"] not in headers:
        raise ValueError(f"{path}: no array 'images'{nearest('images', headers)}")
    arrays = read_arrays(path, names.values())
    images, labels = arrays[names["images"]], arrays.get(names["labels"])
    if images.dtype != np.uint8 or images.ndim not in (3, 4, 5) or 0 in images.shape[1:]:
        raise ValueError(
            f"{path}: {names['images']}: expected uint8 (N, H, W) or (N, H, W, C) in [0, 255], got {images.dtype} "
            f"{images.shape}"
        )
    no_labels = _unlike(labels, len(images), "iu", f"{path}: {names['labels']}: expected int")
    return Archive(
        images=images if images.ndim > 3 else images[..., None],
        labels=None if no_labels else labels,
        no_labels=no_labels,
        captions=_captions(arrays.get(names["captions"]), len(images), path),
    )


def _unlike(column: np.ndarray | None, count: int, kinds: str, expected: str) -> str | None:
    """Return what is wrong with the type or shape of a column of an ``.npz``; None if nothing is."""
    if column is None or (column.dtype.kind in kinds and column.shape == (count,)):
        return None
    return f"{expected} ({count},), got {column.dtype} {column.shape}"


def _captions(captions: np.ndarray | None, count: int, path: Path) -> Column[Texts]:
    column = Column[Texts]()
    one = captions if captions is None or captions.ndim < 2 or not captions.size else captions[:, 0]
    if problem := _unlike(one, count, "U", f"{path}: captions: expected str"):
        column.fail(problem)
    elif captions is not None:
        for row, text in enumerate(captions.tolist()):
            column.add(read_texts, text, f"{path}[{row}]: captions")
    return column
