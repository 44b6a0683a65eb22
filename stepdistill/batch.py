"""Batches of data sources, and batches of methods."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RawBatch:
    """A batch of a data source, before a family encodes it.

    Attributes:
        images: (B, C, H, W), or clips (B, C, F, H, W), float32 in [-1, 1]; None if a method needs no data.
        labels: (B,) int64 in [0, num_classes); None for a teacher without classes.
        captions: B texts, as written (possibly empty); None if the data has none.
        indices: B sample indices; ``dataset.name(index)`` names a sample in an error.
        mirrored: (B,) bool, which samples a cache must mirror; only if ``images`` is None.
        unreadable: ``"name: reason"`` of every file that was skipped before these B samples.
        encoded: what the networks see of the samples, if it was stored.
    """

    images: Tensor | None
    labels: Tensor | None
    captions: tuple[str, ...] | None
    indices: tuple[int, ...]
    mirrored: Tensor | None = None
    unreadable: tuple[str, ...] = ()
    encoded: Batch | None = None


Cond = dict[str, Tensor]
"""A network's condition, by argument name; the first axis of every tensor is the batch."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of a method: clean images in the network's space (B, C, ..., H, W) and their conditions."""

    images: Tensor | None
    """None for data-free training."""
    cond: Cond
    size: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on another device."""
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        return Batch(
            images, {name: tensor.to(device, non_blocking=True) for name, tensor in self.cond.items()}, self.size
        )

    def widened(self) -> Batch:
        """Return the batch with conditions of bfloat16 in single precision, of the same numbers."""
        cond = {
            name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor for name, tensor in self.cond.items()
        }
        return dataclasses.replace(self, cond=cond)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        return [*self.cond.values()] if self.images is None else [self.images, *self.cond.values()]

    @property
    def x0(self) -> Tensor:
        """The clean images, for methods that train on them."""
        assert self.images is not None, "this method trains on images; Run checks that the data has some"
        return self.images
