"""Distances and counts between two sets of features: how good, how diverse, how copied.

All of them are functions of feature matrices (N, d), made once by :mod:`stepdistill.features`, so that one pass over
the images feeds every metric. Inputs may have any float type and lie on any device; sums are taken in float64, because
a Fréchet distance is a small difference of large numbers. Results are Python floats. Whatever needs chance (subsets,
splits, resampling) draws it from a seed on the CPU, so equal features give equal numbers on every machine.

| metric | what it sees | paper |
|---|---|---|
| :func:`frechet_distance` | mean and covariance; biased by about 1/N | Heusel et al. 2017, arXiv 1706.08500 |
| :func:`kernel_distance` | all moments up to 3; unbiased | Binkowski et al. 2018, arXiv 1801.01401 |
| :func:`cmmd` | the distribution, softly | Jayasumana et al. 2024, arXiv 2401.09603 |
| :func:`precision_recall`, :func:`density_coverage` | fidelity and diversity apart | 1904.06991, 2002.09797 |
| :func:`inception_score`, :func:`class_accuracy` | sure and varied classes; the asked-for class | 1606.03498 |
| :func:`within_class_spread` | mode collapse inside a class | - |
| :func:`nearest_distance`, :func:`authenticity` | copies of training images | Alaa et al. 2022, arXiv 2102.08921 |

FID, KID, CMMD and Inception score are the names on the features they were published with and of nothing else:
:func:`reported_name`.
"""

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


# ------------------------------------------------------------------------------------------ kernel distances


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3, mean and deviation over random subsets.

    Binkowski et al. 2018 (arXiv 1801.01401), eq. 4 and section 4: KID where the features are Inception's.
    It may fall below 0 for equal distributions.

    Args:
        real: (N, d) features.
        fake: (M, d) features.
        subsets: number of subsets drawn without replacement from each side.
        subset_size: features in each; at most min(N, M).
        seed: of the subsets.

    Raises:
        ValueError: ``subset_size`` exceeds what there is.
    """
    real, fake = checked_pair(real, fake)
    if not 2 <= subset_size <= min(len(real), len(fake)):
        raise ValueError(f"subset_size: found {subset_size}; there are {len(real)} real and {len(fake)} fake images")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        rows, others = (torch.randperm(len(x), generator=generator)[:subset_size] for x in (real, fake))
        x, y = real[rows.to(real.device)], fake[others.to(fake.device)]
        within = [(k.sum() - k.trace()) / (subset_size * (subset_size - 1)) for k in (_cubic(x, x), _cubic(y, y))]
        values.append(within[0] + within[1] - 2 * _cubic(x, y).mean())
    return _estimate(torch.stack(values))


def kernel_influence(real: Tensor, fake: Tensor) -> Tensor:
    """What each of ``fake`` (M, d) adds to the kernel distance: twice its mean kernel to the others less to reals.

    The deviation of these (M,) values is the first-order one of the distance, the reference being given (Serfling 1980,
    section 5.5), so :func:`mean_interval` of them has the width of the distance's interval.
    """
    real, fake = checked_pair(real, fake)
    blocks = []
    for rows in fake.split(BLOCK):
        others = (_cubic(rows, fake).sum(1) - _cubic(rows[:, None], rows[:, None])[:, 0, 0]) / (len(fake) - 1)
        blocks.append(2 * (others - _cubic(rows, real).mean(1)))
    return torch.cat(blocks)


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.mT / x.shape[-1] + 1) ** 3


def cmmd(real: Tensor, fake: Tensor, *, sigma: float = 10.0) -> float:
    """1000 x the squared MMD with the Gaussian kernel exp(-|x - y|^2 / 2 sigma^2) on features of unit length; >= 0.

    Jayasumana et al. 2024 (arXiv 2401.09603), eq. 3 and section 4, with the V-statistic (diagonal kept) and the
    factor of the authors' code. The published numbers are on CLIP ViT-L/14@336's projected embedding.

    Args:
        real: (N, d) features.
        fake: (M, d) features.
        sigma: width of the kernel.
    """
    real, fake = (normalize(x, dim=1) for x in checked_pair(real, fake))
    to_own, to_other = _mean_gaussian(fake, fake, sigma), _mean_gaussian(fake, real, sigma)
    return 1000 * (_mean_gaussian(real, real, sigma).mean() + to_own.mean() - 2 * to_other.mean()).item()


def cmmd_influence(real: Tensor, fake: Tensor, *, sigma: float = 10.0) -> Tensor:
    """What each of ``fake`` (M, d) adds to :func:`cmmd`, as :func:`kernel_influence` says it of the kernel distance."""
    real, fake = (normalize(x, dim=1) for x in checked_pair(real, fake))
    return 2000 * (_mean_gaussian(fake, fake, sigma) - _mean_gaussian(fake, real, sigma))


def _mean_gaussian(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """The mean over ``y`` of k - 1 for each of ``x``: k = 1 - 1e-4 itself would lose its digits."""
    return torch.cat([torch.expm1((rows @ y.T - 1) / sigma**2).mean(1) for rows in x.split(BLOCK)])


# ----------------------------------------------------------------------------------------------------- checks


def _estimate(values: Tensor) -> Estimate:
    return Estimate(values.mean().item(), values.std().item() if len(values) > 1 else 0.0)
