"""Distances between two sets of features (N, d) by kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stepdistill.evaluation.metrics.frechet import checked_pair
from stepdistill.evaluation.metrics.manifold import BLOCK


class Estimate(NamedTuple):
    """A mean and the standard deviation over subsets or splits."""

    mean: float
    std: float


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Return the unbiased squared MMD with the kernel (x.y / d + 1)^3: mean and deviation over random subsets.

    Binkowski et al. 2018 (arXiv 1801.01401), eq. 4 and section 4: KID on Inception's features. It may be
    negative for equal distributions.

    Args:
        real: (N, d) features.
        fake: (M, d) features.
        subsets: number of subsets drawn without replacement from each side.
        subset_size: features in each; at most min(N, M).
        seed: of the subsets.

    Raises:
        ValueError: if ``subset_size`` exceeds the number of images of a side.
    """
    real, fake = checked_pair(real, fake)
    if not 2 <= subset_size <= min(len(real), len(fake)):
        raise ValueError(f"subset_size: got {subset_size} for {len(real)} real and {len(fake)} fake images")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x, y = _subset(real, subset_size, generator), _subset(fake, subset_size, generator)
        values.append(_mean_of_pairs(_cubic(x, x)) + _mean_of_pairs(_cubic(y, y)) - 2 * _cubic(x, y).mean())
    return estimate(torch.stack(values))


def kernel_influence(real: Tensor, fake: Tensor) -> Tensor:
    """Return the influence (M,) of each of ``fake``: twice its mean kernel with the others minus that with the reals.

    To first order the deviation of these values is that of the distance, for a fixed reference (Serfling 1980, section
    5.5). So :func:`~stepdistill.evaluation.metrics.bootstrap.mean_interval` of them is as wide as the distance's.
    """
    real, fake = checked_pair(real, fake)
    blocks = []
    for rows in fake.split(BLOCK):
        others = (_cubic(rows, fake).sum(1) - _cubic(rows[:, None], rows[:, None])[:, 0, 0]) / (len(fake) - 1)
        blocks.append(2 * (others - _cubic(rows, real).mean(1)))
    return torch.cat(blocks)


def _subset(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` rows without replacement."""
    return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]


def _mean_of_pairs(kernel: Tensor) -> Tensor:
    """Return the mean of a kernel matrix (n, n) over pairs of different images."""
    return (kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1))


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.mT / x.shape[-1] + 1) ** 3


def cmmd(real: Tensor, fake: Tensor, *, sigma: float = 10.0) -> float:
    """Return 1000 x the squared MMD with the Gaussian kernel exp(-|x - y|^2 / 2 sigma^2) on unit features; >= 0.

    Jayasumana et al. 2024 (arXiv 2401.09603), eq. 3 and section 4, with the V-statistic (diagonal kept) and the
    factor of the authors' code. The published numbers are on CLIP ViT-L/14@336's projected embedding.

    Args:
        real: (N, d) features.
        fake: (M, d) features.
        sigma: width of the kernel.
    """
    real, fake = _unit_pair(real, fake)
    to_own, to_other = _mean_gaussian(fake, fake, sigma), _mean_gaussian(fake, real, sigma)
    return 1000 * (_mean_gaussian(real, real, sigma).mean() + to_own.mean() - 2 * to_other.mean()).item()


def cmmd_influence(real: Tensor, fake: Tensor, *, sigma: float = 10.0) -> Tensor:
    """Return the influence (M,) of each of ``fake`` on :func:`cmmd`, as :func:`kernel_influence` does."""
    real, fake = _unit_pair(real, fake)
    return 2000 * (_mean_gaussian(fake, fake, sigma) - _mean_gaussian(fake, real, sigma))


def _unit_pair(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    real, fake = checked_pair(real, fake)
    return normalize(real, dim=1), normalize(fake, dim=1)


def _mean_gaussian(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """Return the mean over ``y`` of k - 1 for each of ``x``; k itself, about 1 - 1e-4, would lose digits."""
    return torch.cat([torch.expm1((rows @ y.T - 1) / sigma**2).mean(1) for rows in x.split(BLOCK)])


def estimate(values: Tensor) -> Estimate:
    """Return the mean and the standard deviation of values (n,); 0 of a single one."""
    return Estimate(values.mean().item(), values.std().item() if len(values) > 1 else 0.0)
