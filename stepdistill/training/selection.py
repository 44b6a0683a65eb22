"""The best student of a run by its evaluation metric, which is kept beside the checkpoints and exported.

Adversarial and distribution-matching training do not improve steadily, so the last student is seldom the best. The
weights with the lowest distance are in one file, which is replaced as a whole. Selection makes the measured number
optimistic, so the contract of an export tells how it was selected; measure a final number again, on other noise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.files.reading import parse_json
from stepdistill.files.writing import atomic_write, writing_to
from stepdistill.networks.sharding import write

DISTANCES = ("fd", "fid", "kd", "kid", "cmmd", "mmd")
"""Metrics by which students are selected; lower is better."""


FILE = "best.safetensors"

REMEDY = "remove it, and the best student is chosen anew from there on"


class Kept(NamedTuple):
    """What the file holds."""

    record: dict[str, Any]
    tensors: dict[str, Tensor]


class BestStudent:
    """The weights of the exported role at its best measurement in a stage.

    Args:
        folder: the run's.
        on: what measurements depend on (feature network, reference, samples), JSON values that are kept with the
            weights. A run that is resumed with others selects afresh, because their numbers do not compare.
    """

    def __init__(self, folder: Path, on: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.path = folder / FILE
        self.on = on

    def offer(
        self, stage: str, step: int, values: Mapping[str, float], weights: Mapping[str, Tensor],
        sampling: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        """Keep ``weights`` if the first distance in ``values`` is below all that were measured so in this stage.

        ``sampling`` is the contract of the sampler that made the measured images.
        """
        metric = next((name for name in values if name in DISTANCES), None)
        if metric is None or not math.isfinite(values[metric]):
            return
        measured = {"metric": metric, **self.on, **sampling}
        record = {"stage": stage, "step": step, "value": values[metric], **measured}
        best = self._header() if self.path.is_file() else {}
        if best.get("stage") == stage and _comparable(best, measured) and best["value"] <= values[metric]:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        record["sha256"] = _digest(tensors)
        with writing_to(self.path), atomic_write(self.path) as partial:
            save_file(tensors, partial, metadata={"record": json.dumps(record)})

    def record(self, stage: str) -> dict[str, Any] | None:
        """Return step, value and metric of the student kept from ``stage``, and what it was measured on; or None."""
        if not self.path.is_file():
            return None
        record = self._read().record
        return record if record.get("stage") == stage else None

    def check(self) -> None:
        """Raise ``ValueError`` if a student was kept whose file is damaged."""
        if self.path.is_file():
            self._read()

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Write the kept student into ``weights``."""
        kept = self._read().tensors
        for name, tensor in weights.items():
            if name not in kept or kept[name].shape != tensor.shape:
                raise ValueError(f"{self.path}: {name} is missing or of another shape; {REMEDY}")
        for name, tensor in weights.items():
            write(tensor, kept[name])

    def _header(self) -> dict[str, Any]:
        """Read the record and the hash without the weights, which every measurement would wait for."""
        with self._reading(), safe_open(self.path, framework="pt") as file:
            text = (file.metadata() or {}).get("record")
        if text is None:
            raise ValueError(f"{self.path}: expected a student that a run kept, got other weights; {REMEDY}")
        record = parse_json(text, str(self.path))
        if not {"stage", "step", "value", "metric"} <= record.keys():
            raise ValueError(f"{self.path}: its record lacks stage, step, value or metric; {REMEDY}")
        return record

    def _read(self) -> Kept:
        """Read the whole file, so that damage is found before hours of training and not after them."""
        record = self._header()
        with self._reading():
            tensors = load_file(self.path)
        if record.pop("sha256", None) not in (None, _digest(tensors)):
            raise ValueError(f"{self.path}: the content has changed since it was written (SHA-256 differs); {REMEDY}")
        return Kept(record, tensors)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what is said of a file that cannot be read into a sentence."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path}: cannot be read: {error}; {REMEDY}") from error

    def forget(self) -> None:
        """Remove the student that another run left in the folder."""
        self.path.unlink(missing_ok=True)


def _comparable(record: Mapping[str, Any], measured: Mapping[str, Any]) -> bool:
    """Whether a record is of the same metric, measured on the same; older records may lack a key."""
    return all(record.get(name, value) == value for name, value in measured.items())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
