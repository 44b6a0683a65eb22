"""Diversity within classes, and copies of training images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.frechet import checked, checked_pair
from stepdistill.evaluation.metrics.manifold import BLOCK, radii_of


class Nearest(NamedTuple):
    """Distance (N,) float64 to the nearest row of the other set, and which ``row`` that is (N,) int64."""

    distance: Tensor
    row: Tensor


# ------------------------------------------------------------------------------------- diversity and copies


def within_class_spread(real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor) -> float:
    """Mean over classes of tr Cov(fake of the class) / tr Cov(real of the class): 1 as varied as real, 0 collapsed.

    Args:
        real: (N, d) features.
        real_labels: (N,) int.
        fake: (M, d) features.
        fake_labels: (M,) int: the classes that were asked for.

    Raises:
        ValueError: a class of the fakes has fewer than two images on a side.
    """
    return within_class_deviations(real, real_labels, fake, fake_labels).mean().item()


def within_class_deviations(real: Tensor, real_labels: Tensor, fake: Tensor, fake_labels: Tensor) -> Tensor:
    """What each of ``fake`` (M, d) adds to :func:`within_class_spread`, which is the mean of these (M,) values."""
    real, fake = checked_pair(real, fake)
    classes = fake_labels.unique().tolist()
    values = fake.new_zeros(len(fake))
    for label in classes:
        ours, theirs = fake[fake_labels == label], real[real_labels == label]
        if min(len(ours), len(theirs)) < 2:
            raise ValueError(f"class {label}: spread needs 2 images; found {len(theirs)} real, {len(ours)} fake")
        squares = (ours - ours.mean(0)).square().sum(1) / (len(ours) - 1) / theirs.var(0).sum()
        values[fake_labels == label] = squares * len(fake) / len(classes)
    return values


def nearest_distance(queries: Tensor, training: Tensor) -> Nearest:
    """Euclidean distance from each of ``queries`` (N, d) to its nearest of ``training`` (M, d), and which one that is.

    Copies of training images show as distances far below those of held-out real images. Rows may be features or pixels.
    """
    queries, training = checked_pair(queries, training, least=1)
    blocks = [torch.cdist(rows, training).min(1) for rows in queries.split(BLOCK)]
    return Nearest(torch.cat([block.values for block in blocks]), torch.cat([block.indices for block in blocks]))


def authenticity(fake: Tensor, training: Tensor) -> float:
    """Share of fakes that are farther from their nearest training image than that one is from its own neighbours.

    Alaa et al. 2022 (arXiv 2102.08921), section 4.3. Held-out real images score about 0.5, copies 0.

    Args:
        fake: (N, d) features.
        training: (M, d) features of the images trained on.
    """
    return authentic(nearest_distance(fake, training), training).double().mean().item()


def authentic(nearest: Nearest, training: Tensor) -> Tensor:
    """Which images (N,) are farther from their ``nearest`` of ``training`` than that one from its own neighbours."""
    return nearest.distance > radii_of(checked(training), 1)[nearest.row]
