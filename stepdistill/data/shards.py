"""Rows of tensors in numbered safetensors files beside a manifest: made once, resumable, read row by row.

A folder is a manifest (JSON: what made the rows, and how many there are) and ``shard-00000.safetensors``, ...; a shard
is complete or absent. Running the same command again makes the missing shards, if the manifest agrees.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.config import differences, fingerprint_json
from stepdistill.files.writing import atomic_write


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of shard ``number``."""
    return folder / f"shard-{number:05d}.safetensors"


def write_or_check_manifest(path: Path, manifest: Mapping[str, Any], rows: str) -> None:
    """Write a manifest, or check that the one already there is the same.

    Args:
        path: the manifest's file.
        manifest: its content.
        rows: name of the rows, for the error.

    Raises:
        ValueError: if it differs, naming every key that does.
    """
    if not path.is_file():
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        return
    existing = json.loads(path.read_text(encoding="utf-8"))
    if changed := differences(existing, manifest):
        raise ValueError(
            f"{path} is of other {rows}; restore these or choose another output_dir:\n  - " + "\n  - ".join(changed)
        )


def write_shards(
    folder: Path, count: int, shard_size: int, make: Callable[[range], Mapping[str, Tensor]],
    progress: Callable[[int], object] = lambda done: None,
) -> None:  # fmt: skip
    """Write the shards that are missing.

    Args:
        folder: where they go.
        count: number of rows in all.
        shard_size: rows per file, which is the most that a stopped run loses.
        make: returns the tensors, by name, of the rows at some indices.
        progress: called after every shard with the number of rows so far.
    """
    for number in range(math.ceil(count / shard_size)):
        indices = range(number * shard_size, min(count, (number + 1) * shard_size))
        path = shard_path(folder, number)
        if not path.is_file():
            tensors = {name: tensor.contiguous() for name, tensor in make(indices).items()}
            with atomic_write(path) as partial:
                save_file(tensors, partial)
        progress(indices.stop)


@dataclasses.dataclass(frozen=True)
class ShardFormat:
    """What shards hold, as error messages name it.

    Attributes:
        key: configuration key that names the folder.
        rows: what the rows are, in the plural.
        manifest: file name of the manifest.
        script: the script that makes them.
    """

    key: str
    rows: str
    manifest: str
    script: str


class Shards:
    """Rows of a folder; they need not fit into memory.

    Args:
        folder: what :func:`write_or_check_manifest` and :func:`write_shards` wrote.
        format: what they hold.

    Raises:
        ValueError: if there are none, or some are missing.
    """

    def __init__(self, folder: str | Path, format: ShardFormat) -> None:
        self.folder, self.format = Path(folder), format
        path = self.folder / format.manifest
        if not path.is_file():
            raise ValueError(
                f"{format.key}: no {format.manifest} in {self.folder}; make {format.rows} with {format.script} first"
            )
        self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.count, self.shard_size = self.manifest["count"], self.manifest["shard_size"]
        self.shards = [self._open(number) for number in range(math.ceil(self.count / self.shard_size))]

    def __len__(self) -> int:
        return self.count

    @property
    def version(self) -> str:
        """What tells these rows from others of the same folder: a hash of the manifest."""
        return fingerprint_json(self.manifest)

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self.shards[0].keys())

    @property
    def cond_names(self) -> list[str]:
        """Names of the conditions, which are stored as ``cond.<name>``."""
        return [name.removeprefix("cond.") for name in self.names if name.startswith("cond.")]

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Return the rows of tensor ``name`` at ``indices``, (B, ...), in that order; half becomes single precision."""
        rows = []
        for index in indices:
            shard, row = divmod(index, self.shard_size)
            rows.append(single(self.shards[shard].get_slice(name)[row : row + 1]))
        return torch.cat(rows)

    def _open(self, number: int) -> Any:
        path, format = shard_path(self.folder, number), self.format
        if not path.is_file():
            raise ValueError(f"{format.key}: {path} is missing; run {format.script} again, which makes what is missing")
        try:
            shard = safe_open(path, framework="pt")
            rows = shard.get_slice(next(iter(shard.keys()))).get_shape()[0]
        except (OSError, SafetensorError, StopIteration) as error:
            raise ValueError(f"{format.key}: {path} cannot be read: {error}; remove it and make it anew") from error
        expected = min(self.shard_size, self.count - number * self.shard_size)
        if rows != expected:
            raise ValueError(
                f"{format.key}: {path}: expected {expected} {format.rows}, got {rows}; remove it and make it anew"
            )
        return shard


def concatenate(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of consecutive parts joined by name."""
    joined = {}
    for name in parts[0]:
        joined[name] = torch.cat([part[name] for part in parts])
    return joined


def single(rows: Tensor) -> Tensor:
    """Return rows in single precision, because the CPU cannot concatenate half ones under autocast."""
    return rows.float() if rows.is_floating_point() else rows
