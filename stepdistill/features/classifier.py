"""A compact classifier for small images, whose embedding is the feature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.features.base import FeatureExtractor
from stepdistill.files.reading import read_json
from stepdistill.files.schema import convert
from stepdistill.networks.hooks import capture_outputs

MAX_SIZE = 4096
"""Largest number of channels, classes or features that a folder may ask for."""


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
            _convolution(in_channels, width, kernel=5, stride=2),
            _convolution(width, 2 * width),
            _convolution(2 * width, 2 * width, stride=2),
            _convolution(2 * width, 3 * width),
            _convolution(3 * width, 3 * width),
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"_class_name": type(self).__name__, **self.config, "facts": facts}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        state = {}
        for name, tensor in self.state_dict().items():
            state[name] = _half(tensor).cpu().contiguous()
        save_file(state, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SmallConvNet:
        """Read what :meth:`save_pretrained` wrote; float32, frozen, in evaluation mode, named after the folder.

        Raises:
            ValueError: with the name of the file that is missing, damaged, or of another network.
        """
        folder = Path(folder)
        config, weights = read_json(folder / "config.json"), folder / "model.safetensors"
        sizes = {}
        for name in ("in_channels", "num_classes", "width", "num_features"):
            sizes[name] = convert(config.get(name), int, f"{folder / 'config.json'}: {name}")
            if not 0 < sizes[name] <= MAX_SIZE:
                raise ValueError(f"{folder / 'config.json'}: {name}: expected 1 to {MAX_SIZE}, got {sizes[name]}")
        network = cls(**sizes)
        try:
            network.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{weights}: expected the weights of this network: {error}") from error
        network.name = folder.name
        return network.requires_grad_(False).eval()


def _convolution(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
