"""Moving the weights of one role towards another's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PART = 2**26
"""So many entries are brought to the device at a time: 256 MB in float32."""

Pair = tuple[list[Tensor], list[Tensor]]


def blend_tensors(targets: list[Tensor], sources: list[Tensor], keep: float) -> None:
    """``target <- keep target + (1 - keep) source`` for floating-point tensors, of which targets may be on the host.

    These are blended on the device, part by part, in the same bits; the host waits until they are back.
    """
    if not targets or targets[0].device == sources[0].device:
        _blend(targets, sources, keep)
    else:
        blend_by_parts(targets, sources, keep)


def blend_by_parts(targets: list[Tensor], sources: list[Tensor], keep: float, entries: int = PART) -> None:
    """Blend copies of the targets beside their sources, ``entries`` or a tensor at a time, and copy them back."""
    for some, their_sources in parts(targets, sources, entries):
        near = list(map(torch.empty_like, their_sources))
        torch._foreach_copy_(near, some, non_blocking=True)
        _blend(near, their_sources, keep)
        torch._foreach_copy_(some, near)


def _blend(targets: list[Tensor], sources: list[Tensor], keep: float) -> None:
    if keep == 0:
        torch._foreach_copy_(targets, sources)
    else:
        torch._foreach_lerp_(targets, sources, 1 - keep)


def parts(targets: list[Tensor], sources: list[Tensor], entries: int) -> Iterator[Pair]:
    """Yield both lists in parts of about ``entries`` entries, at least a tensor each."""
    start, size = 0, 0
    for end, target in enumerate(targets, start=1):
        size += target.numel()
        if size >= entries or end == len(targets):
            yield targets[start:end], sources[start:end]
            start, size = end, 0
