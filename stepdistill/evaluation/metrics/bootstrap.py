"""Confidence intervals of metrics, from the images themselves: the bootstrap (Efron 1979)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DRAWN = 1_000_000  # indices that are drawn at a time


class Interval(NamedTuple):
    """A confidence interval, in the units of its metric, and its level in (0, 1)."""

    low: float
    high: float
    level: float

    def overlaps(self, other: Interval) -> bool:
        """True where two results are not distinguishable at this level."""
        return self.low <= other.high and other.low <= self.high


def strata(labels: Tensor | None, count: int) -> list[Tensor]:
    """Indices of the images of each class; all ``count`` of them where there are no ``labels`` (count,)."""
    if labels is None:
        return [torch.arange(count)]
    return [(labels.cpu() == label).nonzero()[:, 0] for label in labels.unique().cpu()]


def draw(groups: list[Tensor], generator: torch.Generator) -> Tensor:
    """As many indices as there are, drawn with replacement within each group."""
    return torch.cat([rows[torch.randint(len(rows), rows.shape, generator=generator)] for rows in groups])


def mean_interval(
    values: Tensor, *, labels: Tensor | None = None, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Interval of the mean of one value an image: percentiles of the means of ``resamples`` draws.

    Args:
        values: (N,).
        labels: (N,) int, if the number of images of each class was chosen rather than drawn: images are then drawn
            within their class.
        level: in (0, 1).
        resamples: number of draws.
        seed: of the draws.
    """
    x, generator = values.double().cpu(), torch.Generator().manual_seed(seed)
    sums = torch.zeros(resamples, dtype=torch.float64)
    for rows in strata(labels, len(x)):
        group, size = x[rows], max(1, DRAWN // len(rows))
        shapes = [(min(size, resamples - start), len(rows)) for start in range(0, resamples, size)]
        sums += torch.cat([group[torch.randint(len(rows), shape, generator=generator)].sum(1) for shape in shapes])
    tail = (1 - level) / 2
    low, high = ((sums / len(x)).quantile(q).item() for q in (tail, 1 - tail))
    return Interval(low, high, level)
