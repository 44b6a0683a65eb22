"""Whether images show what their prompts ask for, and how much they differ where prompts do not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.frechet import Moments, checked
from stepdistill.features.vocabulary import UNASKED


def adherence_values(shown: Tensor, asked: Tensor) -> Tensor:
    """Return values (N,) float64 whose mean is the share of asked attributes that are there.

    An image counts as often as its prompt asks. The values are those of the ratio's linear approximation, hits less
    the share of what was asked, so that the bootstrap of their mean is that of the ratio.

    Args:
        shown: (N, attributes) int, values that were read from images.
        asked: (N, attributes) int, values that prompts asked for, or :data:`UNASKED`.

    Raises:
        ValueError: if no prompt asks for anything.
    """
    check_asked(asked)
    wanted = (asked != UNASKED).double()
    hits = (wanted * (shown == asked)).sum(1)
    number = wanted.sum(1)
    share = hits.sum() / number.sum()
    return share + (hits - share * number) / number.mean()


def check_asked(asked: Tensor) -> None:
    """Raise ``ValueError`` if no prompt asks for anything, by what they ask for (N, attributes) int."""
    if not (asked != UNASKED).any():
        raise ValueError("metrics: 'adherence' needs prompts that ask for an attribute; none of the prompts does")


def check_unseen(unseen: Tensor) -> None:
    """Raise ``ValueError`` if none of the prompts asks for a held-out combination, by whether it does (N,) bool."""
    if not unseen.any():
        raise ValueError("metrics: 'adherence_unseen' needs prompts of held-out combinations; none of the prompts is")


def prompt_keys(prompts: Sequence[str]) -> Tensor:
    """Return a number (N,) int64 for each prompt, equal for equal ones."""
    digests = [hashlib.sha256(prompt.encode()).digest()[:8] for prompt in prompts]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])


def within_prompt_deviations(features: Tensor, prompts: Tensor, reference: Moments) -> tuple[Tensor, Tensor]:
    """Return deviations (M,) from the mean of the same prompt, and the prompts (M,), of images that share theirs.

    The mean of the deviations is the covariance's trace within prompts, as a share of the reference's: 0 is one image a
    prompt, 1 is as varied as the whole reference.

    Args:
        features: (N, d).
        prompts: (N,) int, equal for equal prompts.
        reference: whose covariance is the unit.

    Raises:
        ValueError: if no two images share a prompt.
    """
    x = checked(features)
    _, group, counts = prompts.unique(return_inverse=True, return_counts=True)
    check_shared(prompts)
    shared = counts[group] > 1
    means = x.new_zeros(len(counts), x.shape[1]).index_add_(0, group, x) / counts[:, None]
    squares = (x - means[group]).square().sum(1)[shared]
    number = counts[group][shared]
    return squares * number / (number - 1) / reference.cov.trace(), group[shared]


def check_shared(prompts: Tensor) -> None:
    """Raise ``ValueError`` if no two images share a prompt, given by its key (N,) int64."""
    if len(prompts.unique()) == len(prompts):
        raise ValueError("metrics: 'prompt_spread' needs prompts with two images or more; no prompt has")
