r"""Distances and weightings: pure functions that return one number per sample.

Everything is computed in float32 at least, for any precision of the networks.

A squared error of the clean image equals an error of the noise times 1 / SNR. It equals an error of the velocity times
1 / (SNR + 1) for variance preserving processes, and times t^2 for rectified flows (Salimans & Ho 2022, arXiv
2202.00512, Section 4).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["constant", "snr", "truncated_snr", "snr_plus_one"]

Distance = Literal["l1", "l2", "huber"]


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean over pixels of ``(a - b)^2``: (B, ...) -> (B,)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Return ``sqrt(||a - b||^2 + c^2) - c``, norm over all pixels, (B, ...) -> (B,): Song & Dhariwal 2023, Eq. 7."""
    return ((a.float() - b.float()).square().flatten(1).sum(1) + c**2).sqrt() - c


def distance(a: Tensor, b: Tensor, kind: Distance, c: float = 1e-3) -> Tensor:
    """Return the mean over pixels of ``|d|``, ``d^2`` or ``sqrt(d^2 + c^2) - c``, d = a - b: (B, ...) -> (B,)."""
    difference = (a.float() - b.float()).flatten(1)
    match kind:
        case "l1":
            return difference.abs().mean(1)
        case "l2":
            return difference.square().mean(1)
        case "huber":
            return ((difference.square() + c**2).sqrt() - c).mean(1)


def x0_weight(log_snr: Tensor, weighting: Weighting) -> Tensor:
    """Return the weight of an error of the clean image at log-SNRs (B,): (B,), float64.

    ``constant`` is 1. ``snr`` is SNR, the error of the noise; it vanishes at pure noise, so a student of one step needs
    another. ``truncated_snr`` is max(SNR, 1). ``snr_plus_one`` is SNR + 1, the error of the VP velocity.
    """
    snr = log_snr.double().exp()
    match weighting:
        case "constant":
            return torch.ones_like(snr)
        case "snr":
            return snr
        case "truncated_snr":
            return snr.clamp(min=1)
        case "snr_plus_one":
            return snr + 1


def weighted(weight: Tensor, distance: Tensor) -> Tensor:
    """Return the mean over the batch of ``weight * distance``, both (B,)."""
    return (weight.to(distance.device, distance.dtype) * distance).mean()
