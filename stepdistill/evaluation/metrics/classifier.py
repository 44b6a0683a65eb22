"""Metrics of a classifier's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.frechet import checked
from stepdistill.evaluation.metrics.kernel import Estimate, estimate


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> Estimate:
    """Return exp of the mean KL(p(y|x) || p(y)), in [1, classes]: mean and deviation over random splits.

    Salimans et al. 2016 (arXiv 1606.03498), section 4. The images are shuffled first, since they may be in the order of
    their classes.

    Args:
        logits: (N, classes).
        splits: number of parts of the N images, which differ by one image at most.
        seed: of the shuffle.

    Raises:
        ValueError: if a part would have a single image, whose score is always 1.
    """
    x = checked(logits, least=2 * splits)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    scores = []
    for log_p in x[order].log_softmax(1).tensor_split(splits):
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).nansum(1).mean().exp())
    return estimate(torch.stack(scores))


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images, in [0, 1], whose likeliest class by ``logits`` (N, classes) is ``labels`` (N,)."""
    return (checked(logits, least=1).argmax(1) == labels).double().mean().item()
