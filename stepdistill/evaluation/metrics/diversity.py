"""Diversity within classes, and copies of training images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.frechet import checked, checked_pair
from stepdistill.evaluation.metrics.manifold import BLOCK, radii_of


class Nearest(NamedTuple):
    """Distance (N,) float64 to the nearest row of another set, and the index ``row`` (N,) int64 of that row."""

    distance: Tensor
    row: Tensor


def within_class_spread(real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor) -> float:
    """Return the mean over classes of tr Cov(fake) / tr Cov(real): 1 is as varied as real, 0 is collapsed.

    Args:
        real: (N, d) features.
        real_labels: (N,) int.
        fake: (M, d) features.
        fake_labels: (M,) int: the classes that were asked for.

    Raises:
        ValueError: if a class of the fakes has fewer than two images on either side.
    """
    return within_class_deviations(real, real_labels, fake, fake_labels).mean().item()


def within_class_deviations(real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor) -> Tensor:
    """Return the contribution (M,) of each of ``fake`` to :func:`within_class_spread`, which is their mean."""
    real, fake = checked_pair(real, fake)
    check_classes(real_labels, fake_labels)
    classes = fake_labels.unique().tolist()
    values = fake.new_zeros(len(fake))
    for label in classes:
        ours, theirs = fake[fake_labels == label], real[real_labels == label]
        squares = (ours - ours.mean(0)).square().sum(1) / (len(ours) - 1) / theirs.var(0).sum()
        values[fake_labels == label] = squares * len(fake) / len(classes)
    return values


def check_classes(real_labels: Tensor, fake_labels: Tensor) -> None:
    """Raise ``ValueError`` if a class of the fakes has fewer than two images on either side."""
    for label in fake_labels.unique().tolist():
        real, fake = (int((labels == label).sum()) for labels in (real_labels, fake_labels))
        if min(real, fake) < 2:
            raise ValueError(f"spread: expected 2 images of class {label}, got {real} real, {fake} fake")


def nearest_distance(queries: Tensor, training: Tensor) -> Nearest:
    """Return the Euclidean distance of each of ``queries`` (N, d) to the nearest of ``training`` (M, d), and its index.

    Copies of training images have distances far below those of held-out real images. Rows may be features or pixels.
    """
    queries, training = checked_pair(queries, training, least=1)
    distances, indices = [], []
    for rows in queries.split(BLOCK):
        nearest = torch.cdist(rows, training).min(1)
        distances.append(nearest.values)
        indices.append(nearest.indices)
    return Nearest(torch.cat(distances), torch.cat(indices))


def authenticity(fake: Tensor, training: Tensor) -> float:
    """Return the share of fakes that are farther from their nearest training image than that one is from others.

    Alaa et al. 2022 (arXiv 2102.08921), section 4.3. Held-out real images score about 0.5, copies 0.

    Args:
        fake: (N, d) features.
        training: (M, d) features of the images trained on.
    """
    return authentic(nearest_distance(fake, training), training).double().mean().item()


def authentic(nearest: Nearest, training: Tensor) -> Tensor:
    """Return which images (N,) are farther from their ``nearest`` of ``training`` than that one is from others."""
    return nearest.distance > radii_of(checked(training), 1)[nearest.row]
