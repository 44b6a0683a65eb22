"""Fidelity and diversity apart: how much of one set lies among the other, in features (N, d)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.frechet import checked_pair

BLOCK = 1000  # rows of a distance matrix held at a time


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density in [0, N / k], about 1 for equal distributions; coverage in [0, 1]."""

    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Share of fakes inside the real manifold, and of reals inside the fake one.

    Kynkäänniemi et al. 2019 (arXiv 1904.06991), eqs. 1-2: a manifold is the union of balls about its points, each
    reaching to the point's k-th nearest neighbour. Sets of like size make the two comparable.

    Args:
        real: (N, d) features, N > k.
        fake: (M, d) features, M > k.
        k: neighbours.
    """
    precision, recall = manifold_hits(real, fake, k=k)
    return PrecisionRecall(precision.double().mean().item(), recall.double().mean().item())


def manifold_hits(real: Tensor, fake: Tensor, *, k: int = 3) -> tuple[Tensor, Tensor]:
    """Which fakes (M,) lie in the real manifold, which reals (N,) in the fake one; see :func:`precision_recall`."""
    real, fake = checked_pair(real, fake, least=k + 1)
    inside, covered = (
        torch.cat([(torch.cdist(rows, points) <= radii).any(1) for rows in queries.split(BLOCK)])
        for queries, points, radii in [(fake, real, radii_of(real, k)), (real, fake, radii_of(fake, k))]
    )
    return inside, covered


def density_coverage(real: Tensor, fake: Tensor, *, k: int = 5) -> DensityCoverage:
    """How many real balls hold a fake on average (over k), and the share of real balls that hold one at all.

    Naeem et al. 2020 (arXiv 2002.09797), eqs. 3-4; unlike precision and recall neither trusts the fakes' own
    manifold, so outliers cannot inflate them. Expected coverage of equal sets is 1 - 2^-k.

    Args:
        real: (N, d) features, N > k.
        fake: (M, d) features.
        k: neighbours.
    """
    counts, covered = ball_counts(real, fake, k=k)
    return DensityCoverage(counts.mean().item() / k, covered.double().mean().item())


def ball_counts(real: Tensor, fake: Tensor, *, k: int = 5) -> tuple[Tensor, Tensor]:
    """In how many real balls each fake lies (M,), which real balls hold one (N,); see :func:`density_coverage`."""
    real, fake = checked_pair(real, fake, least=k + 1)
    inside = [torch.cdist(rows, fake) <= radii[:, None] for rows, radii in _blocks_with_radii(real, k)]
    counts = torch.stack([block.double().sum(0) for block in inside]).sum(0)
    return counts, torch.cat([block.any(1) for block in inside])


def radii_of(points: Tensor, k: int) -> Tensor:
    """Distance (N,) from each point to its k-th nearest other point."""
    return torch.cat([torch.cdist(rows, points).kthvalue(k + 1).values for rows in points.split(BLOCK)])


def _blocks_with_radii(points: Tensor, k: int) -> zip[tuple[Tensor, Tensor]]:
    return zip(points.split(BLOCK), radii_of(points, k).split(BLOCK), strict=True)
