"""A compact classifier for small images, whose embedding is the feature."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.features.base import FeatureExtractor
from stepdistill.files.reading import read_json
from stepdistill.files.schema import convert
from stepdistill.networks.hooks import capture_outputs

MAX_SIZE = 4096
"""Largest number of channels, classes or features that a folder may ask for."""

Small = TypeVar("Small", bound=FeatureExtractor)


class SmallConvNet(FeatureExtractor):
    """A compact classifier for small images of any size, whose embedding is the feature.

    Five convolutions, the mean over positions, a linear layer, whitening per feature (BatchNorm without scale)
    and tanh: features lie in (-1, 1), are centred and have similar spreads, so that their covariance is well
    conditioned and no single one dominates a distance.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, width: int = 24, num_features: int = 64) -> None:
        super().__init__()
        self.name = "small_convnet"
        self.in_channels, self.num_classes, self.num_features = in_channels, num_classes, num_features
        self.config = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "width": width,
            "num_features": num_features,
        }
        self.body = nn.Sequential(
            convolution(in_channels, width, kernel=5, stride=2),
            convolution(width, 2 * width),
            convolution(2 * width, 2 * width, stride=2),
            convolution(2 * width, 3 * width),
            convolution(3 * width, 3 * width),
        )
        self.embedding = nn.Sequential(
            nn.Linear(3 * width, num_features, bias=False), nn.BatchNorm1d(num_features, affine=False), nn.Tanh()
        )
        self.head = nn.Linear(num_features, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Return the features (B, num_features), in (-1, 1)."""
        x = images.to(self.head.weight.dtype).div(127.5).sub(1)
        return self.embedding(self.body(x).mean((2, 3)))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of all convolutions but the first, (B, C, H, W)."""
        names = [str(index) for index in range(1, len(self.body))]
        return capture_outputs(self.body, names, lambda: self.body(images * 2 - 1))

    def logits(self, features: Tensor) -> Tensor:
        """Return class scores (B, num_classes)."""
        return self.head(features)

    def save_pretrained(self, folder: str | Path, **facts: Any) -> None:
        """Write ``config.json`` and ``model.safetensors`` (half precision), with ``facts`` in the first."""
        write_network(self, Path(folder), self.config, facts)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SmallConvNet:
        """Read what :meth:`save_pretrained` wrote; float32, frozen, in evaluation mode, named after the folder.

        Raises:
            ValueError: with the name of the file that is missing, damaged, or of another network.
        """
        folder = Path(folder)
        network = cls(**read_sizes(folder, ("in_channels", "num_classes", "width", "num_features")))
        return load_network(network, folder)


def read_sizes(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """Return the entries ``names`` of ``config.json``; raise ``ValueError`` for one that is no size of a network."""
    file = folder / "config.json"
    config, sizes = read_json(file), {}
    for name in names:
        sizes[name] = convert(config.get(name), int, f"{file}: {name}")
        if not 0 < sizes[name] <= MAX_SIZE:
            raise ValueError(f"{file}: {name}: expected 1 to {MAX_SIZE}, got {sizes[name]}")
    return sizes


def load_network(network: Small, folder: Path) -> Small:
    """Return ``network`` with the weights of a folder, frozen, in evaluation mode and named after it.

    Raises:
        ValueError: with the name of the file that is missing, damaged, or of another network.
    """
    weights = folder / "model.safetensors"
    try:
        network.load_state_dict(load_file(weights))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights}: expected the weights of this network: {error}") from error
    network.name = folder.name
    return network.requires_grad_(False).eval()


def write_network(network: nn.Module, folder: Path, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write ``config.json``, with the class and ``facts``, and ``model.safetensors`` in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"_class_name": type(network).__name__, **config, "facts": dict(facts)}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    state = {}
    for name, tensor in network.state_dict().items():
        state[name] = _half(tensor).cpu().contiguous()
    save_file(state, folder / "model.safetensors")


def convolution(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution, BatchNorm and ReLU."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
