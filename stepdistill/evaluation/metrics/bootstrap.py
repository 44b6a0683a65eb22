"""Confidence intervals of metrics by the bootstrap (Efron 1979)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DRAWN = 1_000_000
"""Indices that are drawn at a time."""


class Interval(NamedTuple):
    """A confidence interval, in the units of its metric, and its level in (0, 1)."""

    low: float
    high: float
    level: float

    def overlaps(self, other: Interval) -> bool:
        """Return whether two results are not distinguishable at this level."""
        return self.low <= other.high and other.low <= self.high


def strata(labels: Tensor | None, count: int) -> list[Tensor]:
    """Return the indices of the images of each class; all ``count`` of them if there are no ``labels`` (count,)."""
    if labels is None:
        return [torch.arange(count)]
    return [(labels.cpu() == label).nonzero()[:, 0] for label in labels.unique().cpu()]


def draw(groups: list[Tensor], generator: torch.Generator) -> Tensor:
    """Draw as many indices as there are, with replacement, within each group."""
    return torch.cat([rows[torch.randint(len(rows), rows.shape, generator=generator)] for rows in groups])


def mean_interval(
    values: Tensor, *, labels: Tensor | None = None, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return the interval of the mean of one value per image: percentiles of the means of ``resamples`` draws.

    Args:
        values: (N,).
        labels: (N,) int, if the number of images of each class was fixed: images are then drawn within their class.
        level: in (0, 1).
        resamples: number of draws.
        seed: of the draws.
    """
    x, generator = values.double().cpu(), torch.Generator().manual_seed(seed)
    sums = torch.zeros(resamples, dtype=torch.float64)
    for rows in strata(labels, len(x)):
        group, size = x[rows], max(1, DRAWN // len(rows))
        parts = []
        for start in range(0, resamples, size):
            shape = (min(size, resamples - start), len(rows))
            parts.append(group[torch.randint(len(rows), shape, generator=generator)].sum(1))
        sums += torch.cat(parts)
    means, tail = sums / len(x), (1 - level) / 2
    return Interval(means.quantile(tail).item(), means.quantile(1 - tail).item(), level)
