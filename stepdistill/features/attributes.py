"""A network that reads the attributes of small images, and whose embedding is the feature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.config import fingerprint_json
from stepdistill.features.base import FeatureExtractor
from stepdistill.features.classifier import convolution, load_network, read_sizes, write_network
from stepdistill.features.vocabulary import Vocabulary
from stepdistill.networks.hooks import capture_outputs

WORDS = "attributes.yaml"
"""The file of a reader's folder that holds its :class:`Vocabulary`."""

GRID = 4
"""Positions across and down that the embedding sees, because a hat is a hat by where it is."""


class AttributeReader(FeatureExtractor):
    """A compact network with one linear head an attribute, on an embedding that is the feature.

    As :class:`~stepdistill.features.classifier.SmallConvNet`'s, features lie in (-1, 1), are centred and have similar
    spreads. Images may have any size; those of 16 x 16 pixels are read pixel by pixel.
    """

    vocabulary: Vocabulary

    def __init__(self, vocabulary: Vocabulary, in_channels: int = 3, width: int = 32, num_features: int = 96) -> None:
        super().__init__()
        self.name = "attribute_reader"
        self.vocabulary = vocabulary
        self.in_channels, self.num_features = in_channels, num_features
        self.config = {"in_channels": in_channels, "width": width, "num_features": num_features}
        self.body = nn.Sequential(
            convolution(in_channels, width),
            convolution(width, width),
            convolution(width, 2 * width, stride=2),
            convolution(2 * width, 2 * width, stride=2),
        )
        self.embedding = nn.Sequential(
            nn.AdaptiveAvgPool2d(GRID), nn.Flatten(), nn.Linear(2 * width * GRID**2, num_features, bias=False),
            nn.BatchNorm1d(num_features, affine=False), nn.Tanh(),
        )  # fmt: skip
        self.head = nn.Linear(num_features, sum(vocabulary.sizes))

    def embed(self, images: Tensor) -> Tensor:
        """Return the features (B, num_features), in (-1, 1)."""
        return self.embed_floats(images.to(self.head.weight.dtype) / 255)

    def embed_floats(self, images: Tensor) -> Tensor:
        """Return the features (B, num_features) of ``images`` (B, C, H, W) in [0, 1]."""
        features: Tensor = self.embedding(self.body(images * 2 - 1))
        return features

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of all convolutions but the first, (B, C, H, W)."""
        names = [str(index) for index in range(1, len(self.body))]
        return capture_outputs(self.body, names, lambda: self.body(images * 2 - 1))

    def attribute_logits(self, features: Tensor) -> list[Tensor]:
        """Return the scores (B, values) of each attribute."""
        return list(self.head(features).split(self.vocabulary.sizes, dim=1))

    def read(self, features: Tensor) -> Tensor:
        """Return the likeliest value of each attribute, (B, attributes) int64."""
        return torch.stack([scores.argmax(1) for scores in self.attribute_logits(features)], dim=1)

    def preprocessing(self) -> dict[str, Any]:
        """Return the words that ask for attributes, as a hash, since shares of asked attributes depend on them."""
        return {"attributes": fingerprint_json(self.vocabulary)}

    def save_pretrained(self, folder: str | Path, **facts: Any) -> None:
        """Write ``config.json`` with ``facts``, and ``model.safetensors`` (half precision), beside the words."""
        write_network(self, Path(folder), self.config, facts)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AttributeReader:
        """Read a folder of ``attributes.yaml`` and what :meth:`save_pretrained` wrote; float32, frozen.

        Raises:
            ValueError: if a file is missing or holds something else.
        """
        folder = Path(folder)
        sizes = read_sizes(folder, ("in_channels", "width", "num_features"))
        return load_network(cls(Vocabulary.read(folder / WORDS), **sizes), folder)
