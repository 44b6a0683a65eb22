"""Rows of tensors in numbered safetensors files beside a manifest: made once, resumable, read row by row.

A folder is a manifest (JSON: what made the rows, how many they are) and ``shard-00000.safetensors``, ...; a shard is
there whole or not at all. A run that was stopped and started again makes what is missing, if the manifest agrees.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def shard_path(folder: Path, number: int) -> Path:
    """The file of shard ``number``."""
    return folder / f"shard-{number:05d}.safetensors"


def agree(path: Path, wanted: Mapping[str, Any], what: str) -> None:
    """Write a manifest, or check it against the one that is there.

    Args:
        path: of the manifest.
        wanted: its content.
        what: the rows are called in the error.

    Raises:
        ValueError: if it differs, naming every key that does.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if changed := [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]:
        lines = [f"{key}: was {found.get(key)!r}, is {wanted.get(key)!r}" for key in changed]
        raise ValueError(
            f"{path} is of other {what}; restore these or choose another output_dir:\n  - " + "\n  - ".join(lines)
        )


def write_shards(
    folder: Path, count: int, shard_size: int, make: Callable[[range], Mapping[str, Tensor]],
    progress: Callable[[int], object] = lambda done: None,
) -> None:  # fmt: skip
    """Write the shards that are not there yet.

    Args:
        folder: where.
        count: rows in all.
        shard_size: rows a file: what a stopped run loses at most.
        make: the tensors, by name, of the rows at an index.
        progress: told how many rows there are, after every shard.
    """
    for number in range(math.ceil(count / shard_size)):
        indices = range(number * shard_size, min(count, (number + 1) * shard_size))
        path = shard_path(folder, number)
        if not path.is_file():
            temporary = path.with_suffix(".part")
            save_file({name: tensor.contiguous() for name, tensor in make(indices).items()}, temporary)
            os.replace(temporary, path)
        progress(indices.stop)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What shards hold, in the words of errors.

    Attributes:
        key: of the configuration that names the folder.
        rows: what a row is, in the plural.
        manifest: the manifest's file name.
        script: what makes them.
    """

    key: str
    rows: str
    manifest: str
    script: str


class Shards:
    """The rows of a folder; they need not fit into memory.

    Args:
        folder: what :func:`agree` and :func:`write_shards` wrote.
        kind: what they hold.

    Raises:
        ValueError: if there are none, or if they are not complete.
    """

    def __init__(self, folder: str | Path, kind: Kind) -> None:
        self.folder, self.kind = Path(folder), kind
        path = self.folder / kind.manifest
        if not path.is_file():
            raise ValueError(
                f"{kind.key}: no {kind.manifest} in {self.folder}; make {kind.rows} with {kind.script} first"
            )
        self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.count, self.shard_size = self.manifest["count"], self.manifest["shard_size"]
        self.shards = [self._open(number) for number in range(math.ceil(self.count / self.shard_size))]

    def __len__(self) -> int:
        return self.count

    @property
    def names(self) -> list[str]:
        """Of the tensors."""
        return sorted(self.shards[0].keys())

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """The rows of tensor ``name`` at ``indices``, (B, ...), in that order; halves come in single precision."""
        places = [divmod(index, self.shard_size) for index in indices]
        return torch.cat([single(self.shards[shard].get_slice(name)[row : row + 1]) for shard, row in places])

    def _open(self, number: int) -> Any:
        path, kind = shard_path(self.folder, number), self.kind
        if not path.is_file():
            raise ValueError(f"{kind.key}: {path} is missing; run {kind.script} again, it goes on from there")
        try:
            shard = safe_open(path, framework="pt")
            rows = shard.get_slice(next(iter(shard.keys()))).get_shape()[0]
        except (OSError, SafetensorError, StopIteration) as error:
            raise ValueError(f"{kind.key}: {path} cannot be read: {error}; remove it and make it anew") from error
        wanted = min(self.shard_size, self.count - number * self.shard_size)
        if rows != wanted:
            raise ValueError(
                f"{kind.key}: {path} holds {rows} {kind.rows}, wanted {wanted}; remove it and make it anew"
            )
        return shard


def single(rows: Tensor) -> Tensor:
    """Rows in single precision: under autocast, the CPU joins no halves."""
    return rows.float() if rows.is_floating_point() else rows
