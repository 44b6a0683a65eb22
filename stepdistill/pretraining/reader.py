"""Train a network that reads the attributes of small images, and measure it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepdistill.features.attributes import AttributeReader
from stepdistill.pretraining.fit import FitConfig, fit

NOISE = 0.04
"""Largest standard deviation of the noise in training images, whose values are in [0, 1]."""
TINT = 0.012
"""Largest shift of a channel: less than half of what neighbouring colours differ by."""
BLUR = 0.25
"""Largest share of a blurred image in training images."""


class Scoring(nn.Module):
    """A reader's scores of images; as a module, so that processes share its gradient."""

    def __init__(self, reader: AttributeReader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits (B, values) of every attribute of images (B, C, H, W) in [0, 1]."""
        return self.reader.attribute_logits(self.reader.embed_floats(images))


def train_reader(
    network: AttributeReader, images: Tensor, attributes: Tensor, config: FitConfig, accelerator: Accelerator, log: Path
) -> AttributeReader:
    """Minimise the cross-entropy of all attributes on disturbed images, and return the reader, in evaluation mode.

    Args:
        network: the reader.
        images: (N, C, H, W) uint8.
        attributes: (N, attributes) int, indices of values.
        config: of the training; its ``model`` is not used.
        accelerator: device, precision and processes.
        log: file for the loss.
    """

    def loss(net: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        scores = net(disturbed(images[index] / 255, generator).to(accelerator.device))
        targets = attributes[index].long().to(accelerator.device).unbind(1)
        losses = [nn.functional.cross_entropy(s, target) for s, target in zip(scores, targets, strict=True)]
        return torch.stack(losses).sum()

    scoring = fit(Scoring(network), loss, count=len(images), config=config, accelerator=accelerator, log=log)
    reader = scoring.reader.eval()
    for average, trained in zip(reader.buffers(), network.buffers(), strict=True):  # of BatchNorm
        average.copy_(trained)
    return reader


def disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (B, C, H, W) in [0, 1] with a little blur, a tint and noise, as a decoder leaves them.

    Nothing is moved, because the pixels of such images have places.
    """
    batch = (len(images), 1, 1, 1)
    share = BLUR * torch.rand(batch, generator=generator)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    tint = TINT * (2 * torch.rand(len(images), images.shape[1], 1, 1, generator=generator) - 1)
    noise = NOISE * torch.rand(batch, generator=generator) * torch.randn(images.shape, generator=generator)
    return (torch.lerp(images, blurred, share) + tint + noise).clamp(0, 1)


def accuracies(network: AttributeReader, images: Tensor, attributes: Tensor) -> dict[str, float]:
    """Return the share of ``images`` (N, C, H, W) uint8 whose value is read correctly, by attribute, in [0, 1]."""
    right = network.read(network.extract(images)) == attributes
    return dict(zip(network.vocabulary.attributes, right.double().mean(0).tolist(), strict=True))


def read_attributes(path: Path) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) uint8 and attributes (N, attributes) int64 of an ``.npz`` of ``make_faces.py``."""
    with np.load(path, allow_pickle=False) as archive:
        images, attributes = torch.from_numpy(archive["images"]), torch.from_numpy(archive["attributes"])
    return images.movedim(-1, 1).contiguous(), attributes.long()


def lowest(found: Mapping[str, float]) -> str:
    """Return accuracies as text, the lowest first."""
    ordered = sorted(found.items(), key=lambda item: item[1])
    return ", ".join(f"{name} {100 * share:.2f} %" for name, share in ordered)
