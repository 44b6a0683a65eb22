"""The best student of a run by its evaluation metric: kept beside the checkpoints, and what is exported.

Adversarial students and those of distribution matching do not improve steadily; the last is seldom the best. The
weights that measured lowest lie in one file, which is replaced as a whole. A choice is made on measured numbers, which
flatters them, so the contract of an export says what was chosen on; a final number is measured anew, on other noise.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.networks.sharding import write

DISTANCES = ("fd", "fid", "kd", "kid", "cmmd")
"""Metrics by which students are chosen: the lower, the better."""


FILE = "best.safetensors"


class BestStudent:
    """The weights of the role that is exported, at its best measurement in a stage.

    Args:
        folder: the run's.
        on: what is measured on (feature network, reference, samples), JSON values: kept with the weights. A run that
            goes on with others starts its choice anew, since their numbers are not to be compared.
    """

    def __init__(self, folder: Path, on: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.path = folder / FILE
        self.on = on

    def offer(self, stage: str, step: int, values: Mapping[str, float], weights: Mapping[str, Tensor]) -> None:
        """Keep ``weights`` if the first distance in ``values`` is below all that were measured so in this stage."""
        metric = next((name for name in values if name in DISTANCES), None)
        if metric is None or not math.isfinite(values[metric]):
            return
        measured = {"metric": metric, **self.on}
        best = self.record(stage)
        alike = best is not None and all(best.get(name, fact) == fact for name, fact in measured.items())
        if best is not None and alike and values[metric] >= best["value"]:
            return
        record = {"stage": stage, "step": step, "value": values[metric], **measured}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"record": json.dumps(record)})
        os.replace(partial, self.path)

    def record(self, stage: str) -> dict[str, Any] | None:
        """Step, value, metric of what is kept from ``stage``, and what it was measured on; None if nothing is."""
        if not self.path.is_file():
            return None
        with safe_open(self.path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
        return record if record["stage"] == stage else None

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Write what is kept into ``weights``."""
        kept = load_file(self.path)
        for name, tensor in weights.items():
            write(tensor, kept[name])

    def forget(self) -> None:
        """Remove what another run left in the folder."""
        self.path.unlink(missing_ok=True)
