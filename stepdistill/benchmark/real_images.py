"""The row of real images: held-out ones, where there are some, or the reference's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.benchmark.samples import first_places, places_by_class
from stepdistill.evaluation.image_set import ImageSet
from stepdistill.evaluation.reference import Reference
from stepdistill.inference.sampling import Images


@dataclasses.dataclass(frozen=True)
class RealImages:
    """Real images, as many as a row has samples."""

    held_out: ImageSet | None
    reference: Reference
    most: int
    """Images that are measured, at most."""

    @property
    def name(self) -> str | None:
        """Name of the row; None if there are no images."""
        if self.held_out is not None:
            return f"{min(len(self.held_out), self.most):,} held-out images"
        return None if self.reference.images is None else "real images"

    def measured(self) -> Images:
        """Return the first images."""
        if self.held_out is not None:
            return self.held_out.read(range(min(len(self.held_out), self.most)))
        real, first = self._all(), slice(self.most)
        return Images(
            real.pixels[first],
            None if real.labels is None else real.labels[first],
            captions=None if real.captions is None else real.captions[first],
        )

    def like(self, count: int, captions: Sequence[str] | None, num_classes: int | None) -> Tensor:
        """Return images (N, C, H, W) in [0, 1] of the captions or classes of the first ``count`` samples, if known."""
        real = self._all()
        if captions is not None and real.captions is not None:
            chosen = first_places(real.captions, captions[:count])
        elif real.labels is not None and num_classes is not None:
            chosen = places_by_class(real.labels, num_classes, count)
        else:
            chosen = list(range(min(count, len(real.pixels))))
        return real.pixels[torch.tensor(chosen)] / 255

    def _all(self) -> Images:
        real = self.reference.images if self.held_out is None else self.held_out.read(range(len(self.held_out)))
        assert real is not None
        return real
