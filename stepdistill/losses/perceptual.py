"""Distances of two images that should be the same, for regression and for consistency.

- ``l1``, ``l2``, ``huber``: those of :func:`stepdistill.losses.regression.distance`;
- ``pixels``: pseudo-Huber on pixels (or latents), which is robust where a noise could lead to two different images;
- ``features``: the same plus a distance of the teacher's features, as unit vectors at every position like in LPIPS;
- ``lpips``: the learned distance of the DMD and consistency model papers (Zhang et al. 2018, arXiv 1801.03924), VGG on
  images of 224 pixels. It is an optional dependency, since it needs torchvision.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from stepdistill.batch import Cond
from stepdistill.losses.regression import distance
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import BlockFeatures

ConsistencyDistance = Literal["l1", "l2", "huber", "lpips"]

Resemblance = Literal["pixels", "features", "lpips"]

Compare = Callable[[Tensor, Tensor, Cond], Tensor]
"""The distance (B,) of images (B, ...) and (B, ...) of the network's space, under their conditions."""

HUBER_WIDTH = 0.03

LPIPS_SIZE = (224, 224)


def check_resemblance(kind: Resemblance | ConsistencyDistance) -> None:
    """Raise ``ValueError`` if a package that ``kind`` needs is not installed."""
    if kind == "lpips" and importlib.util.find_spec("lpips") is None:
        raise ValueError("method.distance: 'lpips' needs pip install 'stepdistill[lpips]'; or choose another distance")


def open_resemblance(kind: Resemblance, teacher: Denoiser) -> Compare:
    """Return the distance of this name; gradients reach its first argument, and no parameters."""
    match kind:
        case "pixels":
            return pixels
        case "features":
            blocks = BlockFeatures(teacher)
            return lambda a, b, cond: pixels(a, b, cond) + features(blocks, a, b, cond)
        case "lpips":
            return _lpips(teacher)


def open_distance(kind: ConsistencyDistance, teacher: Denoiser) -> Compare:
    """Return the distance of this name, for two predictions of a trajectory's end."""
    if kind == "lpips":
        return _lpips(teacher)
    return lambda a, b, cond: distance(a, b, kind)


def pixels(a: Tensor, b: Tensor, cond: Cond) -> Tensor:
    """Return the pseudo-Huber distance, the mean over pixels."""
    del cond
    return distance(a, b, "huber", HUBER_WIDTH)


def features(blocks: BlockFeatures, a: Tensor, b: Tensor, cond: Cond) -> Tensor:
    """Return half the squared difference of unit feature vectors, the mean over positions and blocks: 0 to 2."""
    with torch.no_grad():
        target = blocks.clean(b, cond)
    return torch.stack(list(map(_angle, blocks.clean(a, cond), target))).mean(0)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    difference = normalize(a.float(), dim=1) - normalize(b.float(), dim=1)
    return 0.5 * difference.square().sum(1).flatten(1).mean(1)


def _lpips(teacher: Denoiser) -> Compare:
    import lpips

    network = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval()

    def view(x0: Tensor) -> Tensor:
        # pixels as they are: decoding clamps, and a pixel beyond white would have no gradient
        images = teacher.family.decode(x0).float() * 2 - 1 if teacher.family.frozen_modules else x0.float()
        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return interpolate(colour, LPIPS_SIZE, mode="bilinear")

    def compare(a: Tensor, b: Tensor, cond: Cond) -> Tensor:
        del cond
        return network.to(a.device)(view(a), view(b)).flatten()

    return compare
