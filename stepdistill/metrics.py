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

from stepdistill.frechet import Moments, bootstrap_interval, checked, checked_pair, frechet_distance
from stepdistill.intervals import Interval, mean_interval
from stepdistill.manifolds import (
    BLOCK,
    DensityCoverage,
    PrecisionRecall,
    ball_counts,
    density_coverage,
    manifold_hits,
    precision_recall,
    radii_of,
)
from stepdistill.reference import ReferenceStatistics

__all__ = [
    "DensityCoverage",
    "Estimate",
    "Interval",
    "Moments",
    "Nearest",
    "PrecisionRecall",
    "ReferenceStatistics",
    "authentic",
    "authenticity",
    "ball_counts",
    "bootstrap_interval",
    "class_accuracy",
    "cmmd",
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "kernel_pull",
    "manifold_hits",
    "mean_interval",
    "nearest_distance",
    "precision_recall",
    "reported_name",
    "within_class_deviations",
    "within_class_spread",
]


class Estimate(NamedTuple):
    """A mean and the standard deviation over subsets or splits."""

    mean: float
    std: float


class Nearest(NamedTuple):
    """Distance (N,) float64 to the nearest row of the other set, and which ``row`` that is (N,) int64."""

    distance: Tensor
    row: Tensor


def reported_name(metric: str, kind: str) -> str:
    """What a result may be called: the published name on its own ``kind`` of features, else a plain one.

    >>> reported_name("fd", "other"), reported_name("fd", "inception"), reported_name("cmmd", "other")
    ('fd', 'fid', 'mmd')
    """
    published = {"fd": "fid", "kd": "kid", "classifier_score": "inception_score"}
    if metric == "cmmd":
        return "cmmd" if kind == "clip" else "mmd"
    return published.get(metric, metric) if kind == "inception" else metric


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


def kernel_pull(real: Tensor, fake: Tensor) -> Tensor:
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


def cmmd_pull(real: Tensor, fake: Tensor, *, sigma: float = 10.0) -> Tensor:
    """What each of ``fake`` (M, d) adds to :func:`cmmd`, as :func:`kernel_pull` says it of the kernel distance."""
    real, fake = (normalize(x, dim=1) for x in checked_pair(real, fake))
    return 2000 * (_mean_gaussian(fake, fake, sigma) - _mean_gaussian(fake, real, sigma))


def _mean_gaussian(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """The mean over ``y`` of k - 1 for each of ``x``: k = 1 - 1e-4 itself would lose its digits."""
    return torch.cat([torch.expm1((rows @ y.T - 1) / sigma**2).mean(1) for rows in x.split(BLOCK)])


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


# ----------------------------------------------------------------------------------------- classifier metrics


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> Estimate:
    """Exponential of the mean KL(p(y|x) || p(y)), in [1, classes]; mean and deviation over random splits.

    Salimans et al. 2016 (arXiv 1606.03498), section 4. The images are shuffled first, since ours come sorted by class.

    Args:
        logits: (N, classes).
        splits: parts into which the N images fall.
        seed: of the shuffle.
    """
    x = checked(logits, least=splits)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    scores = []
    for log_p in x[order].log_softmax(1).chunk(splits):
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).nansum(1).mean().exp())
    return _estimate(torch.stack(scores))


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share in [0, 1] of images whose likeliest class by ``logits`` (N, classes) is ``labels`` (N,)."""
    return (checked(logits, least=1).argmax(1) == labels).double().mean().item()


# ----------------------------------------------------------------------------------------------------- checks


def _estimate(values: Tensor) -> Estimate:
    return Estimate(values.mean().item(), values.std().item() if len(values) > 1 else 0.0)
