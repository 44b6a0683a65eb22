"""What a data set consists of, cheaply: names and sizes, so that a run notices when its data has changed.

A run's folder keeps the inventory of its data. Contents are not read, except for captions and labels, which are in
memory anyway; of an ``.npz``, the checksums that it holds of its arrays tell more than its size.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stepdistill.data.base import Dataset
from stepdistill.data.image_files import visible_files
from stepdistill.files.writing import atomic_write

SHOWN = 5
"""Names of one kind of change that an error lists."""


@dataclass(frozen=True)
class Inventory:
    """By the name of each part of the data, its size or checksum."""

    parts: dict[str, str]

    @property
    def digest(self) -> str:
        """Number of parts, and a hash of all."""
        text = json.dumps(list(self.parts.items()))
        return f"{len(self.parts)} parts, {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def write(self, path: Path) -> None:
        """Write the inventory, a line for each part."""
        with atomic_write(path) as partial, gzip.open(partial, "wt", encoding="ascii") as file:
            file.writelines(f"{size} {ascii(name)}\n" for name, size in self.parts.items())

    def changes_since(self, path: Path) -> list[str]:
        """Return what is different from the inventory at ``path``, a sentence each; nothing if there is none."""
        if not path.is_file():
            return []
        before = _read(path)
        now = {ascii(name): size for name, size in self.parts.items()}
        changed = [name for name in before.keys() & now.keys() if before[name] != now[name]]
        sentences = [
            _listed("removed", before.keys() - now.keys()),
            _listed("added", now.keys() - before.keys()),
            _listed("of another size or content", changed),
        ]
        return [sentence for sentence in sentences if sentence]


def _read(path: Path) -> dict[str, str]:
    parts = {}
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            for line in file:
                size, _, name = line.rstrip("\n").partition(" ")
                parts[name] = size
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path}: expected an inventory of the data: {error}; remove the file") from error
    return parts


def _listed(what: str, names: Iterable[str]) -> str:
    found = sorted(names)
    if not found:
        return ""
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"data {what}: {', '.join(found[:SHOWN])}{more}"


def take_inventory(dataset: Dataset, root: str | None) -> Inventory:
    """Return the inventory of a data set that was opened from ``root``; it has no parts if its version tells all."""
    parts: dict[str, str] = {}
    if dataset.version is not None:
        return Inventory(parts)
    if root is not None:
        parts.update(archives(Path(root)))
        parts.update(_samples(dataset, root))
    columns = (("captions", dataset.captions), ("choices", dataset.choices), ("labels", dataset.labels))
    for name, column in columns:
        if column is not None:
            parts[name] = _digest(column)
    return Inventory(parts)


def _samples(dataset: Dataset, root: str) -> Iterator[tuple[str, str]]:
    """Yield every sample's name below ``root``, and the size of its file if it has one of its own."""
    row, folder = f"{root}[", f"{Path(root)}{os.sep}"
    for index in range(len(dataset)):
        name = dataset.name(index)
        if not name.startswith(row):
            yield name.removeprefix(folder), _size(name)


def archives(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the files that hold several samples each, and their sizes or checksums."""
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                yield member.filename, f"{member.file_size}-{member.CRC:08x}"
        return
    found = [path] if path.is_file() else sorted([*visible_files(path, "*.tar"), *visible_files(path, "*.arrow")])
    for file in found:
        yield file.name, _size(file)


def _size(path: str | Path) -> str:
    """Return a file's size in bytes, or ``-`` if it is no file of its own."""
    try:
        return str(os.stat(path).st_size)
    except OSError:
        return "-"


def _digest(column: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in column:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()[:16]
