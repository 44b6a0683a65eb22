"""Feature networks that judge: images in, one vector each out, and an identity that travels with every number.

A distance between image sets is a distance between their features, so it means nothing without the network, its
weights and its resizing: FID moves by several points with the resize alone (Parmar et al., arXiv 2104.11222). Each
:class:`FeatureExtractor` therefore carries a hash of its weights and a description of its preprocessing, which are
written beside every result and checked against every reference (:mod:`stepdistill.evaluation.reference`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class FeatureExtractor(nn.Module, ABC):
    """A frozen network that maps uint8 images (B, C, H, W) to float32 features (B, num_features)."""

    name: str
    in_channels: int
    num_features: int
    num_classes: int | None = None
    kind = "other"  # "inception" and "clip" have metrics named after them
    repeats_grey = False  # True: grey images become colour by repetition, as PIL's convert("RGB") does

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of uint8 ``images`` whose shape has been checked."""

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) float32 of ``images`` (B, C, H, W) uint8 in [0, 255]; any H and W.

        Raises:
            ValueError: images of another type or number of channels than the network wants.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"features want uint8 images (B, C, H, W); found {images.dtype} {tuple(images.shape)}")
        if images.shape[1] == 1 and self.repeats_grey:
            images = images.expand(-1, self.in_channels, -1, -1)
        if images.shape[1] != self.in_channels:
            kinds = {1: "grey", 3: "colour"}
            found, wanted = (f"{kinds.get(n, '')} ({n} channels)".strip() for n in (images.shape[1], self.in_channels))
            raise ValueError(f"features {self.name!r} want {wanted} images; found {found}")
        return self.embed(images).float()

    def logits(self, features: Tensor) -> Tensor:
        """Class scores (B, num_classes) from ``features`` (B, num_features); a linear layer, so no second pass.

        Raises:
            ValueError: the network is no classifier (``num_classes`` is None).
        """
        del features
        raise ValueError(
            f"features {self.name!r} have no classes; class accuracy and Inception score need a classifier"
        )

    @property
    def sha256(self) -> str:
        """Hash of the weights: of names, shapes and values, whatever file or device they came from."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def preprocessing(self) -> dict[str, Any]:
        """What happens to an image before the network, as JSON values."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Everything that gives a feature its meaning, as JSON values: for result files and references."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "num_features": self.num_features,
            "preprocessing": self.preprocessing(),
        }
