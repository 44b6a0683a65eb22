"""Writing the shards of a folder, by one process or by several at a time, which share the work.

Every process asks for the kernel's lock of a shard before it makes it, and leaves it to the one that holds it. Then it
waits for those that others hold, so that the folder is complete when any process returns. A killed process holds no
lock any more: another one makes its shard, and running the same command again makes all that are missing, if the
manifest agrees. Nothing else is shared, so the processes may be started by a launcher or by hand, on one machine or on
several that share the folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from stepdistill.config import differences
from stepdistill.data.shards import HASHES, narrowed, not_finite, shard_path
from stepdistill.files.hashing import sha256_of
from stepdistill.files.locks import locked, try_locked
from stepdistill.files.reading import read_json
from stepdistill.files.writing import atomic_write


def lock_of(path: Path) -> Path:
    """Return the file whose lock a process holds while it writes ``path``."""
    return path.with_name(f".{path.name}.lock")


def write_or_check_manifest(path: Path, manifest: Mapping[str, Any], rows: str) -> None:
    """Write a manifest, or check that the one already there is the same.

    Args:
        path: the manifest's file.
        manifest: its content.
        rows: name of the rows, for the error.

    Raises:
        ValueError: if it differs, naming every key that does.
    """
    with locked(lock_of(path)):
        if not path.is_file():
            _write_json(path, manifest)
            return
        existing = read_json(path)
    existing.pop(HASHES, None)
    if changed := differences(existing, manifest):
        raise ValueError(
            f"{path} was made for other {rows}; restore these keys or choose another output_dir:\n  - "
            + "\n  - ".join(changed)
        )


def write_shards(
    manifest: Path, rows: str, make: Callable[[range], Mapping[str, Tensor]],
    progress: Callable[[int], object] = lambda done: None,
) -> None:  # fmt: skip
    """Write the shards that are missing, together with other processes that do the same.

    Args:
        manifest: its file, which tells how many rows there are in all and in a shard.
        rows: name of the rows, for errors.
        make: returns the tensors, by name, of the rows at some indices; the same in every process.
        progress: called after every shard with the number of rows so far.

    Raises:
        ValueError: if a row holds a number that is not finite.
    """
    known, done, others = read_json(manifest).get(HASHES, {}), 0, []
    for path, indices in _shards(manifest):
        if not (path.is_file() and path.name in known):
            with try_locked(lock_of(path)) as is_ours:
                if not is_ours:
                    others.append((path, indices))
                    continue
                _complete(path, manifest, rows, indices, make)
        progress(done := done + len(indices))
    for path, indices in others:
        with locked(lock_of(path)):  # when its process has made it, or was killed
            _complete(path, manifest, rows, indices, make)
        progress(done := done + len(indices))


def _shards(manifest: Path) -> list[tuple[Path, range]]:
    """Return the file of every shard, and the rows in it."""
    content = read_json(manifest)
    count, size = content["count"], content["shard_size"]
    shards = []
    for number, start in enumerate(range(0, count, size)):
        shards.append((shard_path(manifest.parent, number), range(start, min(count, start + size))))
    return shards


def _complete(
    path: Path, manifest: Path, rows: str, indices: range, make: Callable[[range], Mapping[str, Tensor]]
) -> None:
    """Make a shard, or note the hash of one that has none; the caller holds its lock."""
    if path.is_file():
        if path.name not in read_json(manifest).get(HASHES, {}):
            _record(manifest, path.name, sha256_of(path))
        return
    tensors = {name: _stored(name, tensor) for name, tensor in make(indices).items()}
    for name, tensor in tensors.items():
        if place := not_finite(tensor):
            raise ValueError(f"{path}: {name} of {rows}[{indices[place[0]]}] became NaN or infinite")
    with hashed_write(path, manifest) as partial:
        save_file(tensors, partial)


def _stored(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor as it is stored: conditions, which are the larger part, in half where that loses nothing."""
    return (narrowed(tensor) if name.startswith("cond.") else tensor).contiguous()


def write_once(path: Path, manifest: Path, write: Callable[[Path], None]) -> None:
    """Write another file of the folder with ``write``, unless it is there and its hash is noted."""
    with locked(lock_of(path)):
        if path.is_file() and path.name in read_json(manifest).get(HASHES, {}):
            return
        with hashed_write(path, manifest) as partial:
            write(partial)


@contextlib.contextmanager
def hashed_write(path: Path, manifest: Path) -> Iterator[Path]:
    """Yield a path as :func:`atomic_write` does, and note its hash in the manifest before it replaces ``path``."""
    with atomic_write(path) as partial:
        yield partial
        _record(manifest, path.name, sha256_of(partial))


def _record(manifest: Path, name: str, sha256: str) -> None:
    with locked(lock_of(manifest)):
        content = read_json(manifest)
        _write_json(manifest, content | {HASHES: content.get(HASHES, {}) | {name: sha256}})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
