"""Students that take the guidance scale as an input, and batches that lack a part of their conditions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.families.base import Family

TINY = 1e-12


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


@torch.no_grad()
def guidance_followed(found: Tensor, guided: Tensor, conditional: Tensor, w: Tensor) -> Tensor:
    """Return the slope of the guidance that clean images show over the guidance they were asked for.

    1 is a student that follows its guidance input, 0 one that ignores it. What an image shows is the share of the
    teacher's guidance ``guided - conditional`` in it, times ``w``: a least-squares line over the batch, each image as
    heavy as the teacher's guidance in it. A batch of one weight has no line, and gives 0.

    Args:
        found: the student's images (B, ...) under ``w``.
        guided: the teacher's images (B, ...) under ``w``.
        conditional: the teacher's images (B, ...) without guidance.
        w: guidance weights (B,).
    """
    asked, shown = ((x - conditional).float().flatten(1) for x in (guided, found))
    heavy, w = asked.square().sum(1).double(), w.double()
    amount = w * (shown * asked).sum(1) / heavy.clamp(min=TINY)
    deviation = w - (heavy * w).sum() / heavy.sum().clamp(min=TINY)
    spread, size = ((heavy * x.square()).sum() for x in (deviation, w))
    return ((heavy * deviation * amount).sum() / torch.maximum(spread, 1e-9 * size + TINY)).float()
