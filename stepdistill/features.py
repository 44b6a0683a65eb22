"""Feature networks that judge: images in, one vector each out, and an identity that travels with every number.

A distance between image sets is a distance between their features, so it means nothing without the network, its
weights and its resizing: FID moves by several points with the resize alone (Parmar et al., arXiv 2104.11222). Each
:class:`FeatureExtractor` therefore carries a hash of its weights and a description of its preprocessing, which are
written beside every result and checked against every reference (:class:`stepdistill.reference.ReferenceStatistics`).
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ASSETS = Path(__file__).parent / "assets" / "fashion"


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


class SmallConvNet(FeatureExtractor):
    """A compact classifier for small images of any size, whose embedding is the feature.

    Five convolutions, the mean over positions, a linear layer, whitening per feature (BatchNorm without scale)
    and tanh: features are bounded in (-1, 1), centred and of like spread, so their covariance is well conditioned
    and no single one rules a distance.
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
        """The 64 (or ``num_features``) bounded features."""
        x = images.to(self.head.weight.dtype).div(127.5).sub(1)
        return self.embedding(self.body(x).mean((2, 3)))

    def logits(self, features: Tensor) -> Tensor:
        """Class scores (B, num_classes)."""
        return self.head(features)

    def save_pretrained(self, folder: str | Path, **facts: Any) -> None:
        """Write ``config.json`` and ``model.safetensors`` (half precision); ``facts`` join the config's ``facts``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"_class_name": type(self).__name__, **self.config, "facts": facts}
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        state = {name: _half(tensor).cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SmallConvNet:
        """Read what :meth:`save_pretrained` wrote; float32, frozen, in evaluation mode, named after the folder."""
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        network = cls(**{key: config[key] for key in ("in_channels", "num_classes", "width", "num_features")})
        network.load_state_dict(load_file(folder / "model.safetensors"))
        network.name = folder.name
        return network.requires_grad_(False).eval()


def _convolution(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def load_features(spec: str, resize: str | None = None) -> FeatureExtractor:
    """The feature network that ``spec`` names, frozen and on the CPU.

    Args:
        spec: ``"embedded"`` (the small Fashion-MNIST classifier of this package), ``"inception"`` or the path of its
            ``.pth`` weights, a folder written by ``SmallConvNet.save_pretrained``, a network of one's own that
            ``torch.export.save`` wrote (``.pt2``: images in [-1, 1] to maps (B, C, H, W), tokens (B, N, C) or vectors,
            see :mod:`stepdistill.features_exported`), or a folder or hub id of a ``transformers`` vision model (DINOv2,
            CLIP, ...).
        resize: Inception only, how images become 299 x 299: ``"adm"``, ``"torch-fidelity"`` (the default; the same),
            ``"torchmetrics"`` or ``"clean"``.

    Raises:
        ValueError: nothing of that name, or something missing to load it; says what to do.
    """
    from stepdistill.features_exported import ExportedFeatures
    from stepdistill.features_vision import InceptionFeatures, TransformersFeatures  # slow to import

    if spec == "inception" or spec.endswith(".pth"):
        return InceptionFeatures.from_pretrained(None if spec == "inception" else spec, resize or "torch-fidelity")
    if resize is not None:
        raise ValueError(f"resize: {resize!r} belongs to Inception; features {spec!r} bring their own preprocessing")
    if spec == "embedded":
        network = SmallConvNet.from_pretrained(ASSETS / "features")
        network.name = "embedded"
        return network
    if spec.endswith(".pt2"):
        return ExportedFeatures.from_file(spec)
    if _is_small_convnet(Path(spec)):
        return SmallConvNet.from_pretrained(spec)
    return TransformersFeatures.from_pretrained(spec)


def _is_small_convnet(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("_class_name") == SmallConvNet.__name__
