r"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), plain or with the norm of the conditional velocity.

Guidance is linear in predictions of every kind: ``(1 + w) conditional - w unconditional``. It makes the velocity
longer, and images contrasty. Rescaled guidance (Qwen-Image's pipeline) keeps its direction and takes its length from
the conditional velocity: in each token of 2 x 2 pixels by itself, or over the image by one factor that never lengthens
it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedule import NoiseSchedule, expand

Rescale = Literal["none", "token", "global"]


def guide(
    conditional: Prediction, null: Prediction, w: Tensor | float, x_t: Tensor, t: Tensor, schedule: NoiseSchedule,
    rescale: Rescale = "none",
) -> Prediction:  # fmt: skip
    """Return the guided prediction at states ``x_t`` (B, ...) and times ``t`` (B,).

    Args:
        conditional: the prediction under the condition.
        null: that under the null condition.
        w: guidance weights (B,) or one number; 0 is the conditional prediction, -1 the unconditional one.
        x_t: noisy images.
        t: their times.
        schedule: the schedule of both.
        rescale: where the velocity keeps the conditional one's norm.
    """
    w = expand(torch.as_tensor(w, dtype=torch.float64).expand(len(x_t)), x_t)
    x0, eps = (torch.lerp(free, given, 1 + w) for given, free in zip(conditional, null, strict=True))
    if rescale == "none":
        return Prediction(x0, eps)
    velocity = rescaled(Prediction(x0, eps).flow(), conditional.flow(), rescale)
    return from_flow(velocity, x_t, t, schedule)


def rescaled(velocity: Tensor, like: Tensor, rescale: Literal["token", "global"]) -> Tensor:
    """Return velocities (B, C, H, W) with the norms of ``like``, per token or, if that is shorter, per image."""
    if rescale == "global":
        ratio = _norm(like, (1, 2, 3)) / _norm(velocity, (1, 2, 3))
        return velocity * ratio.clamp(max=1)
    side = 2 if velocity.shape[2] % 2 == velocity.shape[3] % 2 == 0 else 1
    tokens, wanted = pixel_unshuffle(velocity, side), pixel_unshuffle(like, side)
    return pixel_shuffle(tokens * (_norm(wanted, (1,)) / _norm(tokens, (1,))), side)


def from_flow(velocity: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Prediction:
    """Return the prediction whose :meth:`Prediction.flow` is ``velocity`` (B, ...), on any schedule."""
    alpha, sigma = schedule.coefficients(t, x_t)
    x0 = (x_t - sigma * velocity) / (alpha + sigma)
    return Prediction(x0, x0 + velocity)


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.square().sum(axes, keepdim=True).sqrt().clamp(min=1e-8)
