"""Adversarial losses of critics and students, and gradient penalties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

AdversarialLoss = Literal["hinge", "softplus"]

Logits = list[Tensor]
"""A tensor (B, positions) per head."""


def critic_loss(real: Logits, fake: Logits, kind: AdversarialLoss) -> Tensor:
    """Return the critic's loss: the sum over heads of the mean over samples and positions.

    Logits of 0 have a loss of 2 per head (hinge) or 2 ln 2 (softplus).
    """
    losses = []
    for r, f in _pairs(real, fake):
        if kind == "hinge":
            losses.append(relu(1 - r).mean() + relu(1 + f).mean())
        else:
            losses.append(softplus(-r).mean() + softplus(f).mean())
    return _sum(losses)


def generator_loss(fake: Logits, kind: AdversarialLoss) -> Tensor:
    """Return the student's loss: ``-D`` (hinge), or the non-saturating ``softplus(-D)``, summed over heads."""
    losses = []
    for logits in fake:
        losses.append(-logits.float().mean() if kind == "hinge" else softplus(-logits.float()).mean())
    return _sum(losses)


def critic_metrics(real: Logits, fake: Logits) -> dict[str, Tensor]:
    """Return a critic's accuracy on real and on generated images (the share of logits with the right sign), and means.

    Accuracies of about 0.5 to 0.9 train a student. At 1 the critic is saturated, and its gradient carries little.
    """
    r, f = torch.cat(real, 1).detach().float(), torch.cat(fake, 1).detach().float()
    hits = {"accuracy_real": (r > 0).float().mean(), "accuracy_fake": (f < 0).float().mean()}
    return hits | {"logit_real": r.mean(), "logit_fake": f.mean()}


def r1_penalty(heads: Callable[[list[Tensor]], Logits], features: Sequence[Tensor]) -> Tensor:
    """Return ``||grad_F D(F)||^2``, the sum over heads and mean over samples (Mescheder et al. 2018, arXiv 1801.04406).

    ``D`` is the mean over positions; for ``D(F) = <w, F>`` the penalty is ``||w||^2``.
    """
    with torch.enable_grad():
        leaves = [feature.detach().requires_grad_() for feature in features]
        total = _sum([logits.float().mean(1).sum() for logits in heads(leaves)])
        gradients = torch.autograd.grad(total, leaves, create_graph=True)
        return _sum([gradient.float().square().flatten(1).sum(1).mean() for gradient in gradients])


def approximate_r1(
    heads: Callable[[list[Tensor]], Logits], features: Sequence[Tensor], perturbed: Sequence[Tensor], alpha: float
) -> Tensor:
    """Return ``((D(F') - D(F)) / alpha)^2``, the sum over heads and mean over samples: R1 without a second derivative.

    Args:
        heads: the critic.
        features: of real images.
        perturbed: of the same images plus ``alpha`` times unit Gaussian noise (or those features plus as much), so that
            the expectation over the noise is R1, up to ``alpha^2``.
        alpha: standard deviation of the noise.
    """
    before, after = heads(list(features)), heads(list(perturbed))
    return _sum([((a.mean(1) - b.mean(1)) / alpha).square().mean() for a, b in _pairs(after, before)])


def _pairs(real: Logits, fake: Logits) -> list[tuple[Tensor, Tensor]]:
    return [(r.float(), f.float()) for r, f in zip(real, fake, strict=True)]


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()
