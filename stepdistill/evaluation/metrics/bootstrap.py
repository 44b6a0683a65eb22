"""Confidence intervals of metrics by the bootstrap (Efron 1979)."""

from __future__ import annotations

import math
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


def deviation_interval(values: Tensor, groups: Tensor) -> Interval | None:
    """Return the 95 % interval of the mean of squared deviations from the mean of their group; the groups are fixed.

    The deviations of a group of n lean on each other. Drawn one by one, they vary by (n - 2) / n of what the group's
    variance does (exactly so for Gaussian features), and are stretched by that. Both of a pair are equal, and tell
    nothing of how much its variance varies: pairs are drawn among all pairs, for which the interval is too wide if
    their true variances differ. A single pair among larger groups counts as certain.

    Args:
        values: (N,).
        groups: (N,) int, at least two images of each.

    Returns:
        The interval, cut at 0; None if there is nothing but a single pair.
    """
    if len(values) == 2:
        return None
    _, group, counts = groups.cpu().unique(return_inverse=True, return_counts=True)
    in_pair = counts[group] == 2
    stratum, stretched = torch.where(in_pair, -1, group), values.double().cpu().clone()
    for rows in strata(stratum, len(values)):
        together = 2 if in_pair[rows[0]] else 1
        stretch = math.sqrt(together * len(rows) / max(len(rows) - 2, 1))
        centre = stretched[rows].mean()
        stretched[rows] = centre + stretch * (stretched[rows] - centre)
    low, high, level = mean_interval(stretched, labels=stratum)
    return Interval(max(low, 0.0), high, level)
