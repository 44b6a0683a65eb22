r"""Score identity distillation: the Fisher divergence of two scores, without the unknown one.

A fake score that is exact for the student's images satisfies ``f(x_t) = E[x | x_t]``. With it, the Fisher divergence
``E ||r - f||^2`` of a teacher's denoising r is also ``E <r - f, r - x>``, which holds no score of the student's own.
SiD (Zhou et al. 2024, arXiv 2404.04057, Eq. 23) minimises

.. math:: L = w(t) \langle r - f, (r - x) - a (r - f) \rangle, \qquad x_t = \alpha_t x + \sigma_t n.

Unlike distribution matching, the gradient reaches the image x also through ``x_t``, that is through both frozen
networks. The loss itself says nothing: at a = 1 its expectation is 0 for every student whose fake score is exact.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.diffusion.prediction import from_x0
from stepdistill.diffusion.schedule import NoiseSchedule, expand
from stepdistill.losses.distribution_matching import SMALLEST_DIVISOR, divisor
from stepdistill.losses.regression import mean_square
from stepdistill.networks.denoiser import Denoiser

IdentityWeight = Literal["linear", "classic"]


def identity_error(x0: Tensor, real: Tensor, fake: Tensor, a: float) -> Tensor:
    """Return the mean over pixels of ``(r - f) ((1 - a) (r - x) + a (f - x))``: (B, ...) -> (B,).

    Args:
        x0: images (B, ...) of the student, with their gradient.
        real: the teacher's denoising r of these images with noise, with its gradient by the images.
        fake: the fake score's denoising f, likewise.
        a: 1 or slightly above; at 0 the value is the Fisher divergence, whose gradient is worse.
    """
    x0, real, fake = x0.float(), real.float(), fake.float()
    return ((real - fake) * ((1 - a) * (real - x0) + a * (fake - x0))).flatten(1).mean(1)


def identity_weight(kind: IdentityWeight, schedule: NoiseSchedule, t: Tensor, x0: Tensor, real: Tensor) -> Tensor:
    """Return w (B,), without gradient.

    ``linear`` is the share of signal, ``alpha / (alpha + sigma)``: 1 - t of a flow (SiD-DiT, arXiv 2509.25127).
    ``classic`` is one over the mean absolute error of the teacher's denoising (SiD).
    """
    if kind == "classic":
        return 1 / divisor(x0.detach(), real.detach(), SMALLEST_DIVISOR).flatten()
    alpha, sigma = schedule(t)
    return (alpha / (alpha + sigma)).to(x0.device, torch.float32)


def guided_denoising_loss(fake: Denoiser, w: float, x0: Tensor, noise: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Return the squared error (B,) of the output under guidance weight ``w`` at noised images (B, ...).

    A fake score that is read under guidance must be trained under it too, or it is not ``E[x | x_t]`` (SiD-LSG, Zhou et
    al. 2024, arXiv 2406.01561). At ``w`` = 0 it is the network's pretraining loss.
    """
    x_t = fake.schedule.add_noise(x0, noise, t)
    outputs = []
    for clean in (fake.guided(cond, w)(x_t, t).x0, x0):
        outputs.append(from_x0(clean, x_t, t, fake.schedule, fake.family.prediction_type))
    return mean_square(*outputs)


def shielded(x0: Tensor) -> Tensor:
    """Return ``x0`` (B, ...), through which no sample passes a gradient back that is not finite."""
    x = x0.view_as(x0)
    if x.requires_grad:
        x.register_hook(_finite_samples)
    return x


def _finite_samples(gradient: Tensor) -> Tensor:
    finite = gradient.flatten(1).isfinite().all(1)
    return torch.where(expand(finite, gradient) > 0, gradient, 0)


def over_finite(error: Tensor) -> Tensor:
    """Return the mean over the batch of errors (B,), those that are not finite counted as 0."""
    return torch.where(error.isfinite(), error, 0).mean()
