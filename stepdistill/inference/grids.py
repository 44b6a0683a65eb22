"""Grids of images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

SEEN = 64
"""Side in pixels from which an image is shown as it is."""


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [0, 1] to bytes, the same for metrics and files."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Convert one image (C, H, W), bytes, to PIL: grey, RGB, or (other channel counts) the first channel in grey."""
    array = image.cpu().numpy()
    return Image.fromarray(array.transpose(1, 2, 0)) if len(array) == 3 else Image.fromarray(array[0])


def enlargement(side: int) -> int:
    """Return how many times images of this side are enlarged to be seen: by whole pixels, to :data:`SEEN` or more.

    >>> enlargement(16), enlargement(28), enlargement(64)
    (4, 3, 1)
    """
    return max(1, math.ceil(SEEN / side))


def make_grid(images: Tensor, columns: int = 8, gap: int = 1) -> Image.Image:
    """Arrange images (N, C, H, W) in [0, 1] in rows of ``columns`` on white; small ones are enlarged.

    Of clips (N, C, F, H, W) the first, the middle and the last frame lie side by side.
    """
    images = stills(images) if images.ndim == 5 else images
    count, channels, height, width = images.shape
    shown = channels if channels == 3 else 1
    rows = math.ceil(count / columns)
    canvas = torch.full((shown, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(to_uint8(images[:, :shown]).cpu()):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    picture, scale = to_pil(canvas), enlargement(width)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def stills(clips: Tensor) -> Tensor:
    """Return the first, the middle and the last frame of clips (N, C, F, H, W), side by side: (N, C, H, 3 W)."""
    frames = clips.shape[2]
    return torch.cat([clips[:, :, 0], clips[:, :, frames // 2], clips[:, :, -1]], 3)


def save_grid(images: Tensor, path: Path) -> None:
    """Write a grid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_grid(images).save(path)


def save_comparison(rows: Mapping[str, Tensor], path: Path, title: str = "") -> None:
    """Write one labelled row of images per name, with images (N, C, H, W) in [0, 1] of the same seeds in columns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = max(len(images) for images in rows.values())
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(0.55 * count + 2.6, 0.62 * len(rows) + 0.4), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        axis.imshow(make_grid(images, columns=count), cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        axis.text(-0.01, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    if title:
        figure.axes[0].set_title(title, fontsize=11, pad=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
