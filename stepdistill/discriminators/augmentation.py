"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): differentiable random augmentation of real and generated images.

A critic memorises a small data set; with augmentation it cannot, and gradients still reach the student.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from stepdistill.diffusion.schedule import expand
from stepdistill.randomness import Draws


def diff_augment(images: Tensor, draws: Draws, *, translate: float = 0.125, cut: float = 0.2) -> Tensor:
    """Return images with random colour, translation and cutout.

    Args:
        images: (B, C, H, W) in [0, 1]; the result may leave the range, as in the paper.
        draws: source of random numbers, independent for every image.
        translate: largest shift, as a share of the side.
        cut: side of the square that is cut out, as a share of the side.
    """
    return cutout(shift(colour(images, draws), draws, translate), draws, cut)


def colour(images: Tensor, draws: Draws) -> Tensor:
    """Change brightness by up to 0.5, saturation by a factor of 0 to 2, and contrast by one of 0.5 to 1.5."""
    x = images + expand(draws.uniform(-0.5, 0.5), images)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * expand(draws.uniform(0, 2), x)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * expand(draws.uniform(0.5, 1.5), x)


def shift(images: Tensor, draws: Draws, ratio: float) -> Tensor:
    """Move images by whole pixels, up to ``ratio`` of each side, and fill with zeros."""
    theta = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    for axis, side in enumerate((images.shape[3], images.shape[2])):
        pixels = (draws.uniform(-1, 1) * (ratio * side + 0.5)).trunc()
        theta[:, axis, 2] = (2 * pixels / side).float()
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images.float(), grid, mode="nearest", align_corners=False)


def cutout(images: Tensor, draws: Draws, ratio: float) -> Tensor:
    """Set a random rectangle of ``ratio`` of each side to zero."""
    inside = torch.ones(len(images), 1, *images.shape[2:], device=images.device, dtype=torch.bool)
    for axis in (2, 3):
        side = images.shape[axis]
        centre = (draws.uniform() * side)[:, None]
        near = (torch.arange(side, device=images.device) + 0.5 - centre).abs() < ratio * side / 2
        inside = inside & near.reshape(len(images), 1, *([side, 1] if axis == 2 else [1, side]))
    return images * ~inside
