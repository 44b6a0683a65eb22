"""Images that lie on a disk, to be judged or to judge by: bytes at one size, nothing passed over in silence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from stepdistill.data.base import DataConfig
from stepdistill.data.decoding import UnreadableImageError, read_pixels, read_shape
from stepdistill.data.listing import list_samples, sample_name
from stepdistill.inference.sampling import Images


class ImageFiles:
    """A folder of images, an ``.npz`` or a saved dataset, as the ``data`` section takes them, in a fixed order.

    Args:
        path: see :mod:`stepdistill.data.listing`; labels and captions are read where there are some.
        size: if given, images are resized (short side, bicubic, antialiased) and cropped to a square of this side.
        limit: take a fixed random subset of this many; None takes all.

    Raises:
        ValueError: no images or fewer than ``limit``; broken files; sizes or modes that differ where no ``size`` is
            given. It names the files.
    """

    def __init__(self, path: str | Path, *, size: int | None = None, limit: int | None = None) -> None:
        self.path = Path(path)
        listing = list_samples(DataConfig(name="images", path=str(path)))
        found = len(listing.images)
        if found < max(limit or 0, 2):
            raise ValueError(f"{path}: found {found} images, wanted at least {max(limit or 0, 2)}")
        order = torch.randperm(found, generator=torch.Generator().manual_seed(0))[:limit].tolist()
        self._sources = [listing.images[row] for row in order]
        self._names = [sample_name(listing.images, row, path) for row in order]
        self._captions = None if listing.captions is None else [str(listing.captions[row]) for row in order]
        self._labels = None if listing.labels is None else torch.from_numpy(np.asarray(listing.labels)[order]).long()
        channels, *native = self._shape()
        self.shape = (channels, size, size) if size else (channels, *native)
        if not size:
            self._check_equal()

    def __len__(self) -> int:
        return len(self._sources)

    def read(self, indices: Sequence[int]) -> Images:
        """The images at ``indices``.

        Raises:
            ValueError: naming every one of them that cannot be read.
        """
        pixels, broken = [], []
        channels, height, width = self.shape
        for index in indices:
            try:
                pixels.append(read_pixels(self._sources[index], channels, (height, width)))
            except UnreadableImageError as error:
                broken.append(f"{self._names[index]} ({error})")
        _refuse(broken, "cannot be read")
        rows = list(indices)
        return Images(
            torch.from_numpy(np.stack(pixels)),
            None if self._labels is None else self._labels[rows],
            captions=None if self._captions is None else [self._captions[row] for row in rows],
        )

    def _shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the first image; every file's header is read, so that broken ones are named at once."""
        shapes, broken = [], []
        for source, name in zip(self._sources, self._names, strict=True):
            try:
                shapes.append(read_shape(source))
            except UnreadableImageError as error:
                broken.append(f"{name} ({error})")
        _refuse(broken, "cannot be read")
        self._shapes = shapes
        return shapes[0]

    def _check_equal(self) -> None:
        for shape, name in zip(self._shapes, self._names, strict=True):
            if shape != self._shapes[0]:
                raise ValueError(
                    f"{self.path}: images differ in size or mode: {self._names[0]} is {format_shape(self._shapes[0])}, "
                    f"{name} is {format_shape(shape)}; give a size to resize and crop to, or make them alike"
                )


def _refuse(broken: list[str], what: str) -> None:
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(f"{len(broken)} images {what}: {', '.join(broken[:3])}{more}")


def format_shape(shape: Sequence[int]) -> str:
    """``"28x28 grey"``."""
    channels, height, width = shape
    return f"{height}x{width} " + {1: "grey", 3: "colour"}.get(channels, f"with {channels} channels")


class Fingerprint:
    """A hash of a stream of images: shape and bytes, in order."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, images: Images) -> None:
        """Add the next images."""
        self._digest.update(f"{tuple(images.pixels.shape[1:])}".encode())
        self._digest.update(images.pixels.contiguous().numpy().tobytes())

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._digest.hexdigest()
