"""Fréchet distance, from moments, with an interval.

The distance between N(m, S) and N(m', S'), fitted to the features of two image sets,

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)),

is called FID on Inception's features (Heusel et al. 2017, arXiv 1706.08500) and FD on any others. It needs only
:class:`Moments`, so that a reference is a small file. All computations are in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.bootstrap import Interval, draw, strata


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and unbiased covariance (d, d), float64, of ``n`` features; ``n`` is None where a file lacks it."""

    n: int | None
    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Return the moments of ``features`` (N, d), N >= 1; the covariance of a single row is 0."""
        x = checked(features, least=1)
        mean = x.mean(0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred / max(len(x) - 1, 1))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together, for sets that do not fit in memory (Chan et al. 1979, eq. 2.1)."""
        assert self.n is not None and other.n is not None, "moments read from a foreign file cannot be merged"
        n, shift = self.n + other.n, other.mean - self.mean
        scatter = (self.n - 1) * self.cov + (other.n - 1) * other.cov
        scatter = scatter + torch.outer(shift, shift) * (self.n * other.n / n)
        return Moments(n, self.mean + shift * (other.n / n), scatter / (n - 1))


def frechet_distance(real: Moments, fake: Moments) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians, |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)); >= 0.

    Heusel et al. 2017 (arXiv 1706.08500), eq. 6; Dowson & Landau 1982. The last trace is taken as the sum of the
    square roots of the eigenvalues of S^(1/2) S' S^(1/2), which is symmetric: no complex numbers, no iteration.

    Raises:
        ValueError: if a side has fewer than two features, or the lengths of features differ.
    """
    return _frechet(real, fake, _root(_at_least_two(real).cov))


def bootstrap_interval(
    fake: Tensor,
    real: Moments,
    *,
    labels: Tensor | None = None,
    level: float = 0.95,
    resamples: int = 100,
    seed: int = 0,
) -> Interval:
    """Return the interval of the Fréchet distance of ``len(fake)`` images at ``level``, for a fixed reference.

    Images are drawn with replacement ``resamples`` times (Efron 1979); a draw is a vector of counts, so each costs one
    weighted covariance. A draw has fewer distinct images, which doubles the upward bias that N images have anyway. The
    interval is therefore the spread of the draws about their own mean, moved to the distance and cut at 0. It is too
    wide where the distance is mostly bias (for a sample of the reference itself).

    Args:
        fake: (N, d) features.
        real: moments of the reference, which is not resampled: all rows of a table share it.
        labels: (N,) int, if the number of images of each class was fixed: images are then drawn within their class.
        level: in (0, 1).
        resamples: number of draws.
        seed: of the draws.
    """
    x = checked(fake)
    whole = Moments.of(x)
    root = _root(_at_least_two(real).cov)
    centred = x - whole.mean
    groups = strata(labels, len(x))
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(resamples):
        counts = torch.bincount(draw(groups, generator), minlength=len(x)).to(x)
        shift = counts @ centred / len(x)
        cov = (centred.T @ (centred * counts[:, None]) - len(x) * torch.outer(shift, shift)) / (len(x) - 1)
        distances.append(_frechet(real, Moments(len(x), whole.mean + shift, cov), root))
    spread = torch.tensor(distances, dtype=torch.float64)
    spread = spread - spread.mean()
    tail = (1 - level) / 2
    distance = _frechet(real, whole, root)
    low, high = distance + spread.quantile(tail).item(), distance + spread.quantile(1 - tail).item()
    return Interval(max(low, 0.0), high, level)


def _frechet(real: Moments, fake: Moments, real_root: Tensor) -> float:
    _at_least_two(fake)
    if real.mean.shape != fake.mean.shape:
        raise ValueError(f"features: expected length {len(real.mean)}, as the reference has, got {len(fake.mean)}")
    fake_mean, fake_cov = fake.mean.to(real.mean), fake.cov.to(real.cov)
    cross = torch.linalg.eigvalsh(real_root @ fake_cov @ real_root).clamp(min=0).sqrt().sum()
    distance = (real.mean - fake_mean).square().sum() + real.cov.trace() + fake_cov.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _root(cov: Tensor) -> Tensor:
    """Return the symmetric square root (d, d) of a covariance, whose eigenvalues may be negative by rounding."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _at_least_two(moments: Moments) -> Moments:
    if moments.n is not None and moments.n < 2:
        raise ValueError(f"features: expected at least 2 images for a covariance, got {moments.n}")
    return moments


def checked(features: Tensor, least: int = 2) -> Tensor:
    """Return ``features`` (N, d) in float64, after the checks that every metric needs.

    Raises:
        ValueError: for another shape, fewer than ``least`` rows, and NaN or infinite values.
    """
    if features.ndim != 2:
        raise ValueError(f"features: expected (N, d), got {tuple(features.shape)}")
    if len(features) < least:
        raise ValueError(f"features: expected at least {least} images, got {len(features)}")
    bad = ~features.isfinite().all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"features: {int(bad.sum())} of {len(features)} images have NaN or infinite values, first {first}"
        )
    return features.double()


def checked_pair(real: Tensor, fake: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Return both sets after :func:`checked`; raise ``ValueError`` if their features differ in length."""
    real, fake = checked(real, least), checked(fake, least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features: expected length {real.shape[1]}, as the reference has, got {fake.shape[1]}")
    return real, fake
