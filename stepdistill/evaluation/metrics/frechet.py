"""Fréchet distance: from moments, with an interval.

The distance between N(m, S) and N(m', S'), fitted to the features of two image sets,

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)),

is called FID on Inception's features (Heusel et al. 2017, arXiv 1706.08500) and FD on any others. It needs only
:class:`Moments`, so a reference is a small file; everything here is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.bootstrap import Interval, draw, strata


@dataclass(frozen=True)
class Moments:
    """Mean (d,) and unbiased covariance (d, d), float64, of ``n`` features; ``n`` is None where a file does not say."""

    n: int | None
    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of ``features`` (N, d), N >= 1 (a single row has covariance 0 until it is merged)."""
        x = checked(features, least=1)
        mean = x.mean(0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred / max(len(x) - 1, 1))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together, for streams too large to hold (Chan et al. 1979, eq. 2.1)."""
        assert self.n is not None and other.n is not None, "moments read from a foreign file cannot be merged"
        n, shift = self.n + other.n, other.mean - self.mean
        scatter = (self.n - 1) * self.cov + (other.n - 1) * other.cov
        scatter = scatter + torch.outer(shift, shift) * (self.n * other.n / n)
        return Moments(n, self.mean + shift * (other.n / n), scatter / (n - 1))


def frechet_distance(real: Moments, fake: Moments) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)); >= 0.

    Heusel et al. 2017 (arXiv 1706.08500), eq. 6; Dowson & Landau 1982. The last trace is taken as the sum of the
    square roots of the eigenvalues of S^(1/2) S' S^(1/2), which is symmetric: no complex numbers, no iteration.

    Raises:
        ValueError: fewer than two features on a side, or two feature lengths.
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
    """Interval in which the Fréchet distance of ``len(fake)`` images falls at ``level``, the reference being given.

    Images are drawn with replacement ``resamples`` times (Efron 1979); a draw is a vector of counts, so each costs one
    weighted covariance. A draw has fewer distinct images, which biases its distance upwards by as much again as N
    images already do: the interval is therefore the spread of the draws about their own mean, put at the distance
    and cut at 0. Where the distance is mostly that bias (a sample of the reference itself) it comes out too wide.

    Args:
        fake: (N, d) features.
        real: moments of the reference, which is not resampled: all rows of a table share it.
        labels: (N,) int, if the number of images of each class was chosen rather than drawn: then images are drawn
            within their class, as a new sample would be, and chance in the mix of classes does not widen the interval.
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
    low, high = (distance + spread.quantile(q).item() for q in (tail, 1 - tail))
    return Interval(max(low, 0.0), high, level)


def _frechet(real: Moments, fake: Moments, real_root: Tensor) -> float:
    _at_least_two(fake)
    if real.mean.shape != fake.mean.shape:
        raise ValueError(f"features of length {len(fake.mean)} against a reference of length {len(real.mean)}")
    fake_mean, fake_cov = fake.mean.to(real.mean), fake.cov.to(real.cov)
    cross = torch.linalg.eigvalsh(real_root @ fake_cov @ real_root).clamp(min=0).sqrt().sum()
    distance = (real.mean - fake_mean).square().sum() + real.cov.trace() + fake_cov.trace() - 2 * cross
    return max(distance.item(), 0.0)


def _root(cov: Tensor) -> Tensor:
    """Symmetric square root (d, d) of a covariance; rounding may make an eigenvalue slightly negative."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _at_least_two(moments: Moments) -> Moments:
    if moments.n is not None and moments.n < 2:
        raise ValueError(f"a covariance needs at least 2 images; found {moments.n}")
    return moments


def checked(features: Tensor, least: int = 2) -> Tensor:
    """``features`` (N, d) in float64, after the checks that every metric needs.

    Raises:
        ValueError: another shape, fewer than ``least`` rows, NaN or infinite values.
    """
    if features.ndim != 2:
        raise ValueError(f"features: expected (N, d), found {tuple(features.shape)}")
    if len(features) < least:
        raise ValueError(f"features: at least {least} images are needed, found {len(features)}")
    bad = ~features.isfinite().all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"features: {int(bad.sum())} of {len(features)} images have NaN or infinite values, first {first}"
        )
    return features.double()


def checked_pair(real: Tensor, fake: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both sets after :func:`checked`, which must have features of one length."""
    real, fake = checked(real, least), checked(fake, least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of length {fake.shape[1]} against a reference of length {real.shape[1]}")
    return real, fake
