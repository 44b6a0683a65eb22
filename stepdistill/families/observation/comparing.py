"""How far numbers are apart."""

from __future__ import annotations

from torch import Tensor

CLOSE = 1e-5
"""Largest difference of two tensors that are called equal, as a share of the larger one's largest number."""


def apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors, as a share of the largest number in ``b``."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def proportion(a: Tensor, b: Tensor) -> float | None:
    """Return r with ``a == r b``; None if there is no such number."""
    a, b = a.double().flatten(), b.double().flatten()
    if a.shape != b.shape:
        return None
    r = ((a @ b) / (b @ b)).item()
    return r if r != 0 and apart(a, r * b) < CLOSE else None


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two conditions; infinity for other shapes."""
    return (a.float() - b.float()).abs().max().item() if a.shape == b.shape else float("inf")
