"""Train the small classifier whose features measure images when no large vision model is available.

Plain supervised learning: cross-entropy on left-right flipped images, AdamW under a one-cycle learning
rate (Smith & Topin, arXiv 1708.07120). No label smoothing and only a few epochs, because both pull a class together
to one point (neural collapse, Papyan et al., arXiv 2008.08186), and a metric must see the differences *within* a class.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.data.base import DataConfig
from stepdistill.data.listing import list_samples
from stepdistill.features.classifier import SmallConvNet


def train_classifier(
    network: SmallConvNet, images: Tensor, labels: Tensor, *, epochs: int, batch_size: int, lr: float, seed: int
) -> None:
    """Train ``network`` in place to name the class of an image.

    Args:
        network: the classifier, which is left in evaluation mode.
        images: (N, C, H, W) uint8.
        labels: (N,) int in [0, network.num_classes).
        epochs: passes over the images.
        batch_size: images per step; an incomplete last batch of an epoch is dropped.
        lr: peak learning rate.
        seed: seed of the order of the images and of the flips.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = len(images) // batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs=epochs, steps_per_epoch=steps)
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    started = time.perf_counter()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images), generator=generator)[: steps * batch_size].view(steps, batch_size)
        for index in order:
            batch = random_flip(images[index], generator)
            with torch.autocast(images.device.type, torch.bfloat16):
                logits = network.logits(network(batch))
            loss = nn.functional.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}/{epochs}: last loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    network.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def check_sets(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], batch_size: int) -> None:
    """Raise ``ValueError`` unless a classifier can be trained on one set, in such batches, and measured on the other.

    Args:
        train: images (N, C, H, W) uint8 and their labels (N,).
        test: likewise.
        batch_size: images per step.
    """
    (images, labels), (others, asked) = train, test
    classes = labels.unique()
    if not torch.equal(classes, torch.arange(len(classes))):
        raise ValueError(f"--train: labels: expected 0, 1, 2, ... without a gap, got {classes[:5].tolist()}")
    if batch_size > len(images):
        raise ValueError(f"--batch_size: expected at most {len(images)}, the images of --train, got {batch_size}")
    if others.shape[1:] != images.shape[1:]:
        expected, found = tuple(images.shape[1:]), tuple(others.shape[1:])
        raise ValueError(f"--test: images: expected (C, H, W) {expected}, as in --train, got {found}")
    if not 0 <= int(asked.min()) <= int(asked.max()) < len(classes):
        found_labels = f"{int(asked.min())} to {int(asked.max())}"
        raise ValueError(f"--test: labels: expected 0 to {len(classes) - 1}, as in --train, got {found_labels}")


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``images`` (B, C, H, W), each mirrored left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


@torch.inference_mode()
def accuracy(network: SmallConvNet, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Return the share of ``images`` (N, C, H, W) uint8 that the network classifies correctly, in [0, 1]."""
    hits = 0
    for batch, label in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        hits += (network.logits(network(batch)).argmax(1) == label).sum().item()
    return hits / len(images)


def read_labelled_images(path: str | Path) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) uint8 and labels (N,) int64 of an ``.npz`` with ``images`` and ``labels``.

    Raises:
        ValueError: if the file is damaged, lacks one of the two arrays, or holds no image.
    """
    listing = list_samples(DataConfig(name="images", path=str(path)))
    if listing.array_shape is None or listing.labels is None:
        raise ValueError(f"{path}: expected 'images' and 'labels' in an .npz")
    if not len(listing.images):
        raise ValueError(f"{path}: images: expected at least one, got none")
    images, labels = torch.from_numpy(np.asarray(listing.images)), torch.from_numpy(listing.labels)
    return images.movedim(-1, 1).contiguous(), labels.long()
