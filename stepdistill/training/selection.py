"""The best student of a run by its evaluation metric, which is kept beside the checkpoints and exported.

Adversarial and distribution-matching training do not improve steadily, so the last student is seldom the best. The
weights with the lowest distance are in one file, which is replaced as a whole. Selection makes the measured number
optimistic, so the contract of an export tells how it was selected; measure a final number anew, on other noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.files.writing import atomic_write
from stepdistill.networks.sharding import write

DISTANCES = ("fd", "fid", "kd", "kid", "cmmd")
"""Metrics by which students are selected; lower is better."""


FILE = "best.safetensors"


class BestStudent:
    """The weights of the exported role at its best measurement in a stage.

    Args:
        folder: the run's.
        on: what measurements depend on (feature network, reference, samples), JSON values that are kept with the
            weights. A run that is resumed with others selects anew, because their numbers do not compare.
    """

    def __init__(self, folder: Path, on: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.path = folder / FILE
        self.on = on

    def offer(self, stage: str, step: int, values: Mapping[str, float], weights: Mapping[str, Tensor]) -> None:
        """Keep ``weights`` if the first distance in ``values`` is below all that were measured so in this stage."""
        metric = next(filter(DISTANCES.__contains__, values), None)
        if metric is None or not math.isfinite(values[metric]):
            return
        record = {"stage": stage, "step": step, "value": values[metric], "metric": metric, **self.on}
        best = self.record(stage)
        if best is not None and self._comparable(best, metric) and best["value"] <= values[metric]:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        with atomic_write(self.path) as partial:
            save_file(tensors, partial, metadata={"record": json.dumps(record)})

    def _comparable(self, record: Mapping[str, Any], metric: str) -> bool:
        """Whether a record is of the same metric, measured on the same; older records may lack a key."""
        measured = {"metric": metric, **self.on}
        return all(record.get(name, value) == value for name, value in measured.items())

    def record(self, stage: str) -> dict[str, Any] | None:
        """Return step, value and metric of the student kept from ``stage``, and what it was measured on; or None."""
        if not self.path.is_file():
            return None
        with safe_open(self.path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
        return record if record["stage"] == stage else None

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Write the kept student into ``weights``."""
        kept = load_file(self.path)
        for name, tensor in weights.items():
            write(tensor, kept[name])

    def forget(self) -> None:
        """Remove the student that another run left in the folder."""
        self.path.unlink(missing_ok=True)
