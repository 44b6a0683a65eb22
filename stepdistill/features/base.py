"""Feature networks: images in, one vector each out, and a description that is stored with every number.

A distance between image sets is a distance between their features, so it means nothing without the network, its
weights and its resizing: FID changes by several points with the resizing alone (Parmar et al., arXiv 2104.11222). Each
:class:`FeatureExtractor` therefore has a hash of its weights and a description of its preprocessing, which are
written beside every result and checked against every reference (:mod:`stepdistill.evaluation.reference`).

Metrics use :meth:`FeatureExtractor.extract` on bytes. Critics use :meth:`FeatureExtractor.maps` on real numbers, which
are not rounded and therefore have a gradient.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.features.vocabulary import Vocabulary

BATCH = 50
"""Images that a network embeds at a time: fixed, since the last digits of a feature depend on it."""


class FeatureExtractor(nn.Module, ABC):
    """A frozen network that maps uint8 images (B, C, H, W) to float32 features (B, num_features).

    Attributes:
        name: of the network, for messages and results.
        in_channels: channels of its images.
        num_features: length of its features.
        num_classes: of a classifier; None for other networks.
        vocabulary: of a network that reads attributes; None for other networks.
        kind: ``"inception"``, ``"clip"`` or ``"other"``; some metrics have a published name on the first two.
        repeats_grey: whether grey images are repeated to three channels, as PIL's ``convert("RGB")`` does.
        measures_only: whether the network must not train anything, because published metrics are defined by it.
    """

    name: str
    in_channels: int
    num_features: int
    num_classes: int | None = None
    vocabulary: Vocabulary | None = None
    kind = "other"
    repeats_grey = False
    measures_only = False

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) of uint8 ``images`` of a valid shape."""

    @abstractmethod
    def maps(self, images: Tensor) -> list[Tensor]:
        """Return intermediate features, shallow to deep, (B, C, N) or (B, C, H, W); gradients reach the images.

        Args:
            images: (B, C, H, W) float32 in [0, 1].
        """

    def check_preprocessing(self) -> None:
        """Raise ``ValueError`` if images are scaled to a range that no network is trained on."""

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) float32 of ``images`` (B, C, H, W) uint8 in [0, 255]; any H and W.

        Raises:
            ValueError: if the images have another type or number of channels than the network expects.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"features: expected uint8 images (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
        self.check_shape(images.shape[1:])
        return self.embed(images.expand(-1, self.in_channels, -1, -1)).float()

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ``ValueError`` if the network does not read images of this shape (C, H, W): other channels, clips."""
        channels, *size = shape
        if len(size) != 2:
            raise ValueError(f"features {self.name!r}: expected images, got clips")
        if channels != self.in_channels and not (channels == 1 and self.repeats_grey):
            expected, got = describe_channels(self.in_channels), describe_channels(channels)
            others = "; 'faces', 'efficientnet', 'inception' and vision models read colour" if channels == 3 else ""
            raise ValueError(f"features {self.name!r}: expected {expected} images, got {got}{others}")

    @torch.no_grad()
    def extract(self, pixels: Tensor) -> Tensor:
        """Return features (N, num_features), on the CPU, of any number of uint8 images (N, C, H, W)."""
        device = next(self.parameters()).device
        return torch.cat([self(batch.to(device)).cpu() for batch in pixels.split(BATCH)])

    def logits(self, features: Tensor) -> Tensor:
        """Return class scores (B, num_classes) of ``features`` (B, num_features), by a last linear layer.

        Raises:
            ValueError: if the network is no classifier (``num_classes`` is None).
        """
        del features
        raise ValueError(
            f"features {self.name!r} have no classes; class accuracy and Inception score need a classifier"
        )

    def read(self, features: Tensor) -> Tensor:
        """Return the value of each attribute, (B, attributes) int64, that ``features`` (B, num_features) show.

        Raises:
            ValueError: if the network reads no attributes (``vocabulary`` is None).
        """
        del features
        raise ValueError(f"features {self.name!r} read no attributes; adherence needs an attribute reader")

    @property
    def sha256(self) -> str:
        """Hash of the names, shapes and values of the weights; independent of file and device."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def preprocessing(self) -> dict[str, Any]:
        """Return what is done to an image before the network, as JSON values."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Return all that a feature depends on, as JSON values: for result files and references."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "num_features": self.num_features,
            "preprocessing": self.preprocessing(),
        }


def describe_channels(channels: int) -> str:
    """Return a number of channels as a user reads it.

    >>> describe_channels(1), describe_channels(4)
    ('grey (1 channels)', '(4 channels)')
    """
    kind = {1: "grey ", 3: "colour "}.get(channels, "")
    return f"{kind}({channels} channels)"
