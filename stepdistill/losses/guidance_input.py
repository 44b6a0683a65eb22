"""Students that take the guidance scale as an input, and batches that lack a part of their conditions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.families.base import Family


def check_range(guidance_range: Sequence[float], guidance_scale: float) -> None:
    """Raise ``ValueError`` if the range is no range, or the default scale is outside it; empty is none."""
    if not guidance_range:
        return
    if len(guidance_range) != 2 or not 1 <= guidance_range[0] < guidance_range[1]:
        raise ValueError(f"guidance_range: expected [low, high], 1 <= low < high, got {guidance_range}")
    if not guidance_range[0] <= guidance_scale <= guidance_range[1]:
        raise ValueError(f"guidance_scale: expected one in {guidance_range}, got {guidance_scale}")


def weights(guidance_range: Sequence[float]) -> tuple[float, float] | None:
    """Return the range of guidance weights ``w = guidance_scale - 1`` that a network is told; None of no range."""
    return (guidance_range[0] - 1, guidance_range[1] - 1) if guidance_range else None


def without_condition(family: Family, cond: Cond, dropped: Tensor) -> Cond:
    """Return the condition of a batch, and the null condition where ``dropped`` (B,) says so."""
    null = family.null_cond(cond)
    return {
        name: torch.where(dropped.reshape(-1, *[1] * (part.ndim - 1)).to(part.device), null[name], part)
        for name, part in cond.items()
    }
