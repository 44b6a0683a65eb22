"""Sets of stored images, all of one size; a file that cannot be used is an error."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepdistill.config import fingerprint_json
from stepdistill.data.base import DataConfig
from stepdistill.data.columns import first_texts
from stepdistill.data.decoding import UnreadableImageError, read_pixels, read_shape
from stepdistill.data.listing import list_samples, sample_name
from stepdistill.data.remote import is_address, shown
from stepdistill.data.tars import TarMember
from stepdistill.inference.sampling import Images


class ImageSet:
    """The images of a folder, an ``.npz`` or a saved dataset, shuffled by a fixed permutation.

    Args:
        path: as ``data.path``, see :mod:`stepdistill.data.listing`; of files at an address this machine keeps copies,
            since all of them are read; labels and captions are read where there are some
            that can be used; of several captions an image has the first.
        size: if given, images are resized (short side, bicubic, antialiased) and cropped to a square of this side.
        limit: number of images in a fixed random subset; None takes all.

    Raises:
        ValueError: if there are fewer than two images or fewer than ``limit``; if files are broken, or differ in size
            or mode and no ``size`` is given. It names the files.
    """

    def __init__(self, path: str | Path, *, size: int | None = None, limit: int | None = None) -> None:
        remote = is_address(str(path))
        self.path = shown(str(path)) if remote else str(Path(path))
        listing = list_samples(DataConfig(name="images", path=str(path), bad_files="error", download=remote))
        found = len(listing.images)
        if found < max(limit or 0, 2):
            asked = " (--num_samples)" if limit else ""
            raise ValueError(f"{self.path}: expected at least {max(limit or 0, 2)} images{asked}, got {found}")
        order = torch.randperm(found, generator=torch.Generator().manual_seed(0))[:limit].tolist()
        self._order = order
        self._sources = [listing.images[row] for row in order]
        self._files, self._version = _files_of(self._sources, Path(path)), listing.version
        self._names = [sample_name(listing.images, row, path) for row in order]
        if listing.no_labels:
            warnings.warn(f"labels are not used: {listing.no_labels}", stacklevel=2)
        captions = listing.captions
        self.captions = None if captions is None else first_texts([captions[row] for row in order])
        self.labels = None if listing.labels is None else torch.from_numpy(np.asarray(listing.labels)[order]).long()
        shapes = self._read_shapes()
        self.shape = (shapes[0][0], size, size) if size else shapes[0]
        if not size:
            self._check_equal(shapes)

    def __len__(self) -> int:
        return len(self._sources)

    def read(self, indices: Sequence[int]) -> Images:
        """Return the images at ``indices``.

        Raises:
            ValueError: if some cannot be read; names the first three.
        """
        pixels, broken = [], []
        channels, height, width = self.shape
        for index in indices:
            try:
                pixels.append(read_pixels(self._sources[index], channels, (height, width)))
            except UnreadableImageError as error:
                broken.append(f"{self._names[index]} ({error})")
        _refuse(broken)
        rows = list(indices)
        return Images(
            torch.from_numpy(np.stack(pixels)),
            None if self.labels is None else self.labels[rows],
            captions=None if self.captions is None else [self.captions[row] for row in rows],
        )

    def captions_in_order(self) -> list[str] | None:
        """Return the captions in the order of the files, which is that of a file of prompts if they were made of it."""
        if self.captions is None:
            return None
        return [caption for _, caption in sorted(zip(self._order, self.captions, strict=True))]

    def fingerprint(self) -> str:
        """Return twelve hex digits that change with labels, captions, and the files: names, sizes, times of change."""
        states = [(str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in self._files]
        labels = None if self.labels is None else self.labels.tolist()
        return fingerprint_json([self._version, states, labels, self.captions])

    def _read_shapes(self) -> list[tuple[int, int, int]]:
        """Return the (C, H, W) of every image; reading every header finds all broken files at once."""
        shapes, broken = [], []
        for source, name in zip(self._sources, self._names, strict=True):
            try:
                shapes.append(read_shape(source))
            except UnreadableImageError as error:
                broken.append(f"{name} ({error})")
        _refuse(broken)
        return shapes

    def _check_equal(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        for shape, name in zip(shapes, self._names, strict=True):
            if shape != shapes[0]:
                raise ValueError(
                    f"{self.path}: expected images of one size and mode, got {self._names[0]} with "
                    f"{format_shape(shapes[0])}, {name} with {format_shape(shape)}; --size resizes and crops them"
                )


def _files_of(sources: Sequence[Any], path: Path) -> list[Path]:
    """Return the files on this machine that hold images, which were listed at ``path``."""
    files = {source for source in sources if isinstance(source, str)}
    files |= {source.tar for source in sources if isinstance(source, TarMember)}
    if files:
        return [Path(file) for file in sorted(files)]
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".parquet"))


def _refuse(broken: list[str]) -> None:
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(f"{len(broken)} images cannot be read: {', '.join(broken[:3])}{more}")


def format_shape(shape: Sequence[int]) -> str:
    """Return a shape (C, H, W) as a user reads it.

    >>> format_shape((1, 28, 28))
    '28x28 grey'
    """
    channels, height, width = shape
    return f"{height}x{width} " + {1: "grey", 3: "colour"}.get(channels, f"with {channels} channels")
