"""Rows of tensors in numbered safetensors files beside a manifest, read row by row.

A folder is a manifest (JSON: what made the rows, how many there are, and the SHA-256 of every other file) and
``shard-00000.safetensors``, ..., see :mod:`stepdistill.data.shard_writing`; a shard is complete or absent.

A reader compares a shard with its hash before it takes the first row from it, at about 2 GB/s a core. A folder that
was made before there were hashes is read with a warning; running its command again adds them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stepdistill.config import fingerprint_json
from stepdistill.files.hashing import sha256_of
from stepdistill.files.reading import read_json
from stepdistill.files.schema import convert

HASHES = "sha256"
"""Key of the manifest: by file name, its hash."""


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of shard ``number``."""
    return folder / f"shard-{number:05d}.safetensors"


def not_finite(rows: Tensor) -> list[int]:
    """Return the first of some rows that holds NaN or infinity, as a list of one, or of none."""
    finite = rows.isfinite().reshape(len(rows), -1).all(1)
    return [] if finite.all() else [int(finite.int().argmin())]


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
        folder: what :mod:`stepdistill.data.shard_writing` wrote.
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
        self.manifest = read_json(path)
        self.count, self.shard_size = self.entry("count", int), self.entry("shard_size", int)
        if not (1 <= self.count < 2**48 and 1 <= self.shard_size < 2**48):
            found = f"{self.count} and {self.shard_size}"[:60]
            raise ValueError(f"{path}: expected count and shard_size of at least 1 and below 2**48, got {found}")
        self.shards = [self._open(number) for number in range(-(-self.count // self.shard_size))]
        self._check_alike()
        self._hashes = self.entry(HASHES, dict[str, str]) if HASHES in self.manifest else {}
        self._verified: set[Path] = set()
        self._tensors: dict[tuple[str, int], Tensor] = {}
        self._warn_without_hashes()

    def entry(self, key: str, hint: Any) -> Any:
        """Return an entry of the manifest as the type ``hint``; raise ``ValueError`` if it is missing or another."""
        path = self.folder / self.format.manifest
        if key not in self.manifest:
            raise ValueError(
                f"{path}: {key}: missing; remove {self.folder} and make it again with {self.format.script}"
            )
        return convert(self.manifest[key], hint, f"{path}: {key}")

    def __len__(self) -> int:
        return self.count

    @property
    def version(self) -> str:
        """What tells these rows from others of the same folder: a hash of the manifest, without those of the files."""
        return fingerprint_json({key: value for key, value in self.manifest.items() if key != HASHES})

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return sorted(self.shards[0].keys())

    @property
    def cond_names(self) -> list[str]:
        """Names of the conditions, which are stored as ``cond.<name>``."""
        return [name.removeprefix("cond.") for name in self.names if name.startswith("cond.")]

    def layout(self, number: int = 0) -> dict[str, tuple[str, list[int]]]:
        """Return the type and the shape of a row of every tensor, by name, in shard ``number``."""
        found = {}
        for name in self.shards[number].keys():  # noqa: SIM118, it is no mapping
            header = self.shards[number].get_slice(name)
            found[name] = (header.get_dtype(), header.get_shape()[1:])
        return found

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Return the rows of tensor ``name`` at ``indices``, (B, ...), in that order, in half precision if all are.

        Raises:
            ValueError: if a shard is not what was written, or a row holds NaN or infinity; it names the file.
        """
        first = self._tensor(name, indices[0] // self.shard_size)
        dtype = first.dtype
        for index in indices:
            dtype = torch.promote_types(dtype, self._tensor(name, index // self.shard_size).dtype)
        joined = torch.empty(len(indices), *first.shape[1:], dtype=dtype)
        for place, index in enumerate(indices):
            shard, row = divmod(index, self.shard_size)
            joined[place].copy_(self._tensor(name, shard)[row])
        if found := not_finite(joined):
            shard, row = divmod(indices[found[0]], self.shard_size)
            raise ValueError(
                f"{self.format.key}: {shard_path(self.folder, shard)}: {name}, row {row}: expected finite numbers, got "
                f"NaN or infinity; remove the file and run {self.format.script} again"
            )
        return joined

    def _tensor(self, name: str, shard: int) -> Tensor:
        """Return a tensor of a shard, of which the system reads what is looked at; the file is checked first."""
        if (name, shard) not in self._tensors:
            self.verify(shard_path(self.folder, shard))
            self._tensors[name, shard] = self.shards[shard].get_tensor(name)
        return self._tensors[name, shard]

    def verify(self, path: Path) -> None:
        """Compare a file with its hash, the first time; raise ``ValueError`` if it is another."""
        if path in self._verified:
            return
        if path.name in self._hashes and sha256_of(path) != self._hashes[path.name]:
            raise ValueError(
                f"{self.format.key}: {path} is not what {self.format.script} wrote (its SHA-256 differs); remove it "
                "and run the script again, which makes what is missing"
            )
        self._verified.add(path)

    def _warn_without_hashes(self) -> None:
        without = sum(shard_path(self.folder, number).name not in self._hashes for number in range(len(self.shards)))
        if without:
            warnings.warn(
                f"{self.folder}: {without} of {len(self.shards)} shards were written without hashes, so damage to them "
                f"goes unnoticed; run {self.format.script} again to add hashes",
                stacklevel=3,
            )

    def _check_alike(self) -> None:
        """Raise ``ValueError`` unless all shards hold the same tensors; conditions may be narrowed."""
        expected = self.layout()
        for number in range(1, len(self.shards)):
            if _widened(found := self.layout(number)) != _widened(expected):
                raise ValueError(
                    f"{self.format.key}: {shard_path(self.folder, number)}: expected {expected}, as in the first "
                    f"shard, got {found}; remove it and make it again"
                )

    def _open(self, number: int) -> Any:
        path, format = shard_path(self.folder, number), self.format
        if not path.is_file():
            raise ValueError(f"{format.key}: {path} is missing; run {format.script} again, which makes what is missing")
        try:
            shard = safe_open(path, framework="pt")
            counts = {(shard.get_slice(name).get_shape() or [1])[0] for name in shard.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{format.key}: {path} cannot be read: {error}; remove it and make it again") from error
        expected = min(self.shard_size, self.count - number * self.shard_size)
        if counts != {expected}:
            found = ", ".join(map(str, sorted(counts))) or "none"
            raise ValueError(
                f"{format.key}: {path}: expected {expected} {format.rows}, got {found}; remove it and make it again"
            )
        return shard


def _widened(layout: Mapping[str, tuple[str, list[int]]]) -> dict[str, tuple[str, list[int]]]:
    """Return a layout with conditions in single precision, as they were before they were narrowed."""
    found = dict(layout)
    for name, (dtype, shape) in layout.items():
        if name.startswith("cond.") and dtype == "BF16":
            found[name] = ("F32", shape)
    return found


def concatenate(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of consecutive parts joined by name."""
    joined = {}
    for name in parts[0]:
        joined[name] = torch.cat([part[name] for part in parts])
    return joined


def narrowed(values: Tensor) -> Tensor:
    """Return single precision as bfloat16 if that loses nothing, as with what a teacher of bfloat16 computed.

    >>> narrowed(torch.tensor([1.5])).dtype, narrowed(torch.tensor([0.1])).dtype
    (torch.bfloat16, torch.float32)
    """
    if values.dtype != torch.float32:
        return values
    half = values.bfloat16()
    return half if torch.equal(half.float(), values) else values
