"""Fidelity and diversity as two numbers: how much of one set lies within the other, in features (N, d)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.frechet import checked_pair

BLOCK = 1000
"""Rows of a distance matrix that are in memory at a time."""


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density in [0, N / k], about 1 for equal distributions; coverage in [0, 1]."""

    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Return the share of fakes inside the real manifold, and of reals inside the fake one.

    Kynkäänniemi et al. 2019 (arXiv 1904.06991), eqs. 1-2: a manifold is the union of balls about its points, each
    reaching to the point's k-th nearest neighbour. The two are comparable for sets of similar size.

    Args:
        real: (N, d) features, N > k.
        fake: (M, d) features, M > k.
        k: neighbours.
    """
    precision, recall = manifold_hits(real, fake, k=k)
    return PrecisionRecall(precision.double().mean().item(), recall.double().mean().item())


def manifold_hits(real: Tensor, fake: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """Return which fakes (M,) lie in the real manifold, and which reals (N,) in the fake one; both bool."""
    real, fake = checked_pair(real, fake, least=k + 1)
    return _inside(fake, real, k), _inside(real, fake, k)


def _inside(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """Return which queries (N,) lie in the manifold of ``points``."""
    radii = radii_of(points, k)
    return torch.cat([(torch.cdist(rows, points) <= radii).any(1) for rows in queries.split(BLOCK)])


def density_coverage(real: Tensor, fake: Tensor, *, k: int = 5) -> DensityCoverage:
    """Return the mean number of real balls that hold a fake, over k, and the share of real balls that hold one.

    Naeem et al. 2020 (arXiv 2002.09797), eqs. 3-4; unlike precision and recall they do not use the
    manifold of the fakes, which outliers inflate. Expected coverage of equal sets is 1 - 2^-k.

    Args:
        real: (N, d) features, N > k.
        fake: (M, d) features.
        k: neighbours.
    """
    counts, covered = ball_counts(real, fake, k=k)
    return DensityCoverage(counts.mean().item() / k, covered.double().mean().item())


def ball_counts(real: Tensor, fake: Tensor, *, k: int = 5) -> tuple[Tensor, Tensor]:
    """Return in how many real balls each fake lies (M,), and which real balls hold one (N,)."""
    real, fake = checked_pair(real, fake, least=k + 1)
    counts, covered = [], []
    for rows, radii in zip(real.split(BLOCK), radii_of(real, k).split(BLOCK), strict=True):
        inside = torch.cdist(rows, fake) <= radii[:, None]
        counts.append(inside.double().sum(0))
        covered.append(inside.any(1))
    return torch.stack(counts).sum(0), torch.cat(covered)


def radii_of(points: Tensor, k: int) -> Tensor:
    """Return the distance (N,) of each point to its k-th nearest other point."""
    return torch.cat([torch.cdist(rows, points).kthvalue(k + 1).values for rows in points.split(BLOCK)])
