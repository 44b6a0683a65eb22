"""Rows of many images, accumulated in parts and gathered from all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
import torchmetrics
from torch import Tensor

ROWS = ("features", "clip", "captions", "cut", "prompts", "asked", "shown", "labels", "calls", "seconds", "images")
"""What may be known of the images; see :func:`stepdistill.evaluation.extraction.collect`."""


class FeatureRows(torchmetrics.Metric):
    """Rows of a set of images, by name.

    ``update`` appends the rows of some images, ``compute`` returns the rows of all of them, those of the first process
    first, and ``reset`` forgets them. Metrics are computed from the whole, once: sums of parts would depend on the
    parts in their last digits.

    Args:
        sync_on_compute: False where every process has all rows, which must not be gathered then.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        super().__init__(dist_sync_fn=gather_rows, sync_on_compute=sync_on_compute)
        for name in ROWS:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, rows: Mapping[str, Tensor]) -> None:
        """Append rows (n, ...) under their names; no rows at all are allowed."""
        for name, tensor in rows.items():
            assert name in ROWS, name
            getattr(self, name).append(tensor)

    def compute(self) -> dict[str, Tensor]:
        """Return rows (N, ...) by name, for the names that have any."""
        found = {}
        for name in ROWS:
            parts = getattr(self, name)  # a list, or one tensor once gathered
            if len(parts) > 0:
                found[name] = parts if torch.is_tensor(parts) else torch.cat(parts)
        return found


def gather_rows(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Return the rows of each process that has some, on the CPU; as objects, since processes differ in how many."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, rows.cpu(), group=group)
    return [part for part in gathered if len(part)] or [rows.cpu()]
