"""Latents of several sizes (``data.buckets``) in a cache: every row is as long as the longest, and zero behind its own.

The file of captions tells the size in pixels of every sample.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from torch.nn.functional import pad

from stepdistill.families.base import Family


@dataclasses.dataclass(frozen=True)
class CachedSizes:
    """How latents are stored.

    Attributes:
        sizes: (height, width) of every bucket in pixels; empty if all samples have the teacher's size.
        native: (C, H, W) of that size's latents, of clips (C, F, H, W).
        factor: side in pixels of the square that one latent covers.
    """

    sizes: tuple[tuple[int, int], ...]
    native: tuple[int, ...]
    factor: int

    @classmethod
    def of(cls, family: Family, buckets: Iterable[Sequence[int]]) -> CachedSizes:
        """Return how latents of a teacher are stored, of images in some buckets."""
        factor = family.image_shape[-1] // family.sample_shape[-1]
        return cls(tuple((height, width) for height, width in buckets), tuple(family.sample_shape), factor)

    def shape(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return (C, ..., H, W) of the latents of images or clips of a size."""
        return *self.native[:-2], size[0] // self.factor, size[1] // self.factor

    @property
    def row(self) -> list[int]:
        """The shape of a row."""
        if not self.sizes:
            return list(self.native)
        return [max(math.prod(self.shape(size)) for size in self.sizes)]

    def stored(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, ..., H, W) of one size as rows."""
        if not self.sizes:
            return latents
        flat = latents.flatten(1)
        return pad(flat, (0, self.row[0] - flat.shape[1]))

    def restored(self, rows: Tensor, size: Sequence[int]) -> Tensor:
        """Return the latents (B, C, ..., H, W) that are stored as rows, of images of one size."""
        if not self.sizes:
            return rows
        shape = self.shape(size)
        return rows[:, : math.prod(shape)].reshape(len(rows), *shape)


def by_size(rows: Iterable[int], size_of: Callable[[int], tuple[int, ...]]) -> list[list[int]]:
    """Return rows in groups of one size.

    >>> by_size([1, 2, 3, 5], lambda row: (row % 2,))
    [[1, 3, 5], [2]]
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(size_of(row), []).append(row)
    return list(groups.values())
