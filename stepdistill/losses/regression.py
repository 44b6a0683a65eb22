r"""Distances and weightings: pure functions that return one number a sample.

The loop takes the mean over samples. Everything is computed in float32 at least, whatever the networks ran in.

A squared error of the clean image is worth, as an error of the noise, SNR times as much; as an error of the velocity,
SNR + 1 times (variance preserving) or 1 / t^2 times (rectified flow): Salimans & Ho 2022 (arXiv 2202.00512), Section 4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["constant", "snr", "truncated_snr", "snr_plus_one"]


Distance = Literal["l1", "l2", "huber"]


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean over pixels of ``(a - b)^2``: (B, ...) -> (B,)."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """``sqrt(||a - b||^2 + c^2) - c`` with the norm over all pixels: (B, ...) -> (B,). Song & Dhariwal 2023, Eq. 7."""
    return ((a.float() - b.float()).square().flatten(1).sum(1) + c**2).sqrt() - c


def distance(a: Tensor, b: Tensor, kind: Distance, c: float = 1e-3) -> Tensor:
    """Mean over pixels of ``|d|``, ``d^2`` or ``sqrt(d^2 + c^2) - c`` with ``d = a - b``: (B, ...) -> (B,)."""
    difference = (a.float() - b.float()).flatten(1)
    match kind:
        case "l1":
            return difference.abs().mean(1)
        case "l2":
            return difference.square().mean(1)
        case "huber":
            return ((difference.square() + c**2).sqrt() - c).mean(1)


def x0_weight(log_snr: Tensor, weighting: Weighting) -> Tensor:
    """What an error of the clean image counts for at a log-SNR: (B,) -> (B,), float64.

    ``constant`` 1; ``snr`` SNR, an error of the noise (nothing at pure noise: a student of one step needs another);
    ``truncated_snr`` max(SNR, 1), the larger of both; ``snr_plus_one`` SNR + 1, an error of the VP velocity.
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
    """Mean over the batch of ``weight * distance``, both (B,)."""
    return (weight.to(distance.device, distance.dtype) * distance).mean()
