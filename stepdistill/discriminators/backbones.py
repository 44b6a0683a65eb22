"""Frozen networks through which a critic sees images: gradients reach the image, parameters never change.

Any network of :mod:`stepdistill.features.base` will do, except one that measures the student. A student that is trained
on the features of a network scores well with them, but no better with people (Kynkaanniemi et al. 2022, arXiv
2203.06026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepdistill.features.base import FeatureExtractor
from stepdistill.features.identity import OTHERS, refuse_same_weights
from stepdistill.features.loading import load_features


class Backbone:
    """A frozen feature network of a critic; a plain object, so that no checkpoint holds its weights.

    Args:
        network: the feature network.
        channels: of the images.
        size: height and width of the images.

    Raises:
        ValueError: if the network cannot process such images.
    """

    def __init__(self, network: FeatureExtractor, channels: int, size: tuple[int, int]) -> None:
        self.network = network.requires_grad_(False).eval()
        allowed = (1, network.in_channels) if network.repeats_grey else (network.in_channels,)
        if channels not in allowed:
            raise ValueError(
                f"method.features: {network.name!r} expects images of {network.in_channels} channels, but the "
                f"teacher's have {channels}"
            )
        network.check_preprocessing()
        try:
            probe = self(torch.zeros(1, channels, *size))
            self.num_features = self.embed(torch.zeros(1, channels, *size)).shape[1]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"method.features: {network.name!r} cannot process images of {channels} x {size[0]} x {size[1]}: "
                f"{error}"
            ) from error
        self.shapes = [feature.shape[1:] for feature in probe]

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return features, shallow to deep, of images (B, C, H, W) in [0, 1]."""
        self.network.to(images.device)
        return self.network.maps(images.float())

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Return one vector (B, num_features) per image in [0, 1], without gradient."""
        self.network.to(images.device)
        return self.network(images.float().mul(255).round().to(torch.uint8)).float()


def check_sizes(networks: Mapping[str, FeatureExtractor], channels: int, sizes: Sequence[Sequence[int]]) -> None:
    """Raise ``ValueError`` unless a critic's feature networks can process images of all (height, width) in pixels."""
    for network in networks.values():
        for height, width in sizes:
            Backbone(network, channels, (height, width))


def open_backbone(spec: str, channels: int, size: tuple[int, int]) -> Backbone:
    """Open a critic's feature network, see :func:`stepdistill.features.loading.load_features`.

    Raises:
        ValueError: if the network measures students, or cannot process the teacher's images.
    """
    network = load_features(spec)
    refuse_same_weights({"method.features": network}, load_features("embedded"))
    if network.measures_only:
        raise ValueError(
            f"method.features: {spec!r} is the network that published metrics are defined by, and must not train a "
            f"student; expected {OTHERS}"
        )
    return Backbone(network, channels, size)
