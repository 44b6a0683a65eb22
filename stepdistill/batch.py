"""Batches: what data sources yield, and what methods train on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RawBatch:
    """What a data source yields: before any family has encoded it.

    Attributes:
        images: (B, C, H, W) float32 in [-1, 1]; None where a method needs no data.
        labels: (B,) int64 in [0, num_classes); None for a teacher without classes.
        captions: B texts, as written (possibly empty); None where the data has none.
        indices: B sample indices; ``dataset.name(index)`` names a sample in an error.
        mirrored: (B,) bool, which samples are to be mirrored, where ``images`` is None and a cache has them.
        unreadable: ``"name: reason"`` of every file that was skipped on the way to these B samples.
    """

    images: Tensor | None
    labels: Tensor | None
    captions: tuple[str, ...] | None
    indices: tuple[int, ...]
    mirrored: Tensor | None = None
    unreadable: tuple[str, ...] = ()


Cond = dict[str, Tensor]
"""What a network is conditioned on, by the argument's name; every tensor's first axis is the batch."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What methods see: clean images in the network's space (B, C, H, W) and their conditions."""

    images: Tensor | None
    """None for data-free training."""
    cond: Cond
    size: int

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        return Batch(
            images, {name: tensor.to(device, non_blocking=True) for name, tensor in self.cond.items()}, self.size
        )

    @property
    def x0(self) -> Tensor:
        """The clean images, for methods that train on them."""
        assert self.images is not None, "this method trains on images; Run checks that the data has some"
        return self.images
