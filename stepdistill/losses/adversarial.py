"""Losses of critics and generators, and gradient penalties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

AdversarialLoss = Literal["hinge", "softplus"]


Logits = list[Tensor]
"""A tensor (B, positions) a head."""


# ------------------------------------------------------------------------------------------------ losses


def critic_loss(real: Logits, fake: Logits, kind: AdversarialLoss) -> Tensor:
    """What a critic descends: the sum over heads of the mean over samples and positions.

    Logits of 0 cost 2 a head (hinge) or 2 ln 2 (softplus).
    """
    if kind == "hinge":
        return _sum([relu(1 - r).mean() + relu(1 + f).mean() for r, f in _pairs(real, fake)])
    return _sum([softplus(-r).mean() + softplus(f).mean() for r, f in _pairs(real, fake)])


def generator_loss(fake: Logits, kind: AdversarialLoss) -> Tensor:
    """What a student descends: ``-D`` (hinge), or the non-saturating ``softplus(-D)``, summed over heads."""
    return _sum([-f.float().mean() if kind == "hinge" else softplus(-f.float()).mean() for f in fake])


def critic_metrics(real: Logits, fake: Logits) -> dict[str, Tensor]:
    """How well a critic does: shares of its logits of real and of fake images with the right sign, and their means.

    About 0.5 to 0.9 trains a student; 1 on both is a saturated critic, whose gradient says little.
    """
    r, f = (torch.cat(logits, 1).detach().float() for logits in (real, fake))
    hits = {"accuracy_real": (r > 0).float().mean(), "accuracy_fake": (f < 0).float().mean()}
    return hits | {"logit_real": r.mean(), "logit_fake": f.mean()}


def r1_penalty(heads: Callable[[list[Tensor]], Logits], features: Sequence[Tensor]) -> Tensor:
    """``||grad_F D(F)||^2`` summed over heads, the mean over samples: Mescheder et al. 2018 (1801.04406) on features.

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
    """``((D(F') - D(F)) / alpha)^2`` summed over heads, the mean over samples: R1 without a second derivative.

    Args:
        heads: the critic.
        features: of real images.
        perturbed: of the same images plus ``alpha`` times unit Gaussian noise (or those features plus as much): the
            expectation over the noise then is R1's, up to ``alpha^2``.
        alpha: how far.
    """
    before, after = heads(list(features)), heads(list(perturbed))
    return _sum([((a.mean(1) - b.mean(1)) / alpha).square().mean() for a, b in _pairs(after, before)])


def _pairs(real: Logits, fake: Logits) -> list[tuple[Tensor, Tensor]]:
    return [(r.float(), f.float()) for r, f in zip(real, fake, strict=True)]


def _sum(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()
