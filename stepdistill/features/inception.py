"""Inception-v3's pooled features, with the resizing of the published FIDs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from stepdistill.features.base import FeatureExtractor
from stepdistill.files.words import nearest

RESIZES = {
    "adm": "bilinear-tf1",  # TensorFlow 1's bilinear: no antialias, corners off by half a pixel
    "torch-fidelity": "bilinear-tf1",
    "torchmetrics": "bilinear-antialias",  # torchmetrics >= 1.8
    "clean": "bicubic-antialias",  # clean-fid (Parmar et al., arXiv 2104.11222): PIL's bicubic, not rounded
}


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


INCEPTION_LAYERS = (
    ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"]
    + [f"Mixed_{block}" for block in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")]
    + ["AvgPool"]
)


class InceptionFeatures(FeatureExtractor):
    """Inception-v3 as the literature's FID uses it: 2048 pooled features, 1008 classes (Heusel et al., 1706.08500).

    The network is torch-fidelity's (weights of 2015-12-05), the one ADM, torch-fidelity, pytorch-fid and clean-fid
    share. What differs between them is how an image gets to 299 x 299: see :data:`RESIZES`.
    Grey images are repeated to three channels.
    """

    name = kind = "inception"
    measures_only = True
    in_channels = 3
    repeats_grey = True
    num_features = 2048
    num_classes = 1008

    def __init__(self, network: Any, resize: str) -> None:
        super().__init__()
        if resize not in RESIZES:
            raise ValueError(f"resize: expected one of {', '.join(RESIZES)}, got {resize!r}{nearest(resize, RESIZES)}")
        self.resize = RESIZES[resize]
        self.trunk = nn.Sequential(*(getattr(network, name) for name in INCEPTION_LAYERS)).requires_grad_(False).eval()
        self.fc: nn.Linear = network.fc.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str | None, resize: str) -> InceptionFeatures:
        """Load the weights at ``path`` (``.pth``), or download them where it is None.

        Raises:
            ValueError: if the ``fid`` extra or the file is missing; says how to get them, and what works offline.
        """
        offline = "offline, --features embedded or the folder of a DINOv2 or CLIP model give FD and the other metrics"
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise ValueError(f"FID needs Inception: pip install 'stepdistill[fid]' ({error}); {offline}") from error
        if path is not None:
            _check_weights_file(path)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path)
        except OSError as error:
            source = f"get {INCEPTION_FILE} from torch-fidelity's release v0.2.0 and give its path"
            raise ValueError(f"FID needs Inception's weights: {source} ({error}); {offline}") from error
        return cls(network, resize)

    def embed(self, images: Tensor) -> Tensor:
        """Return the 2048 features before the classifier."""
        if self.resize == "bilinear-tf1":
            from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

            x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
        else:
            x = interpolate(images.float(), (299, 299), mode=self.resize.removesuffix("-antialias"), antialias=True)
        return self.trunk((x - 128) / 128).flatten(1)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Fail: nothing is trained through Inception, see :attr:`measures_only`."""
        raise AssertionError(f"maps of {len(images)} images")

    def logits(self, features: Tensor) -> Tensor:
        """Return the 1008 class scores without bias, as the Inception score has them (Salimans et al., 1606.03498)."""
        return features @ self.fc.weight.T

    def preprocessing(self) -> dict[str, Any]:
        """Return how an image becomes 299 x 299."""
        return {"resize": self.resize}


def _check_weights_file(path: str) -> None:
    """Raise ``ValueError`` unless the file holds Inception's tensors: torch-fidelity itself would unpickle anything."""
    if not Path(path).is_file():
        raise ValueError(f"features {path!r}: expected the file {INCEPTION_FILE}, got nothing there")
    try:
        names = set(torch.load(path, weights_only=True, map_location="cpu"))
    except (pickle.UnpicklingError, RuntimeError, TypeError) as error:
        raise ValueError(f"features {path!r}: expected a file of tensors ({str(error).splitlines()[0]})") from error
    if "Mixed_7c.branch1x1.conv.weight" not in names:
        raise ValueError(f"features {path!r}: expected Inception's weights, {INCEPTION_FILE}")
