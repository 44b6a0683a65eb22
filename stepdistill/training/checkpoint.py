"""Checkpoints of a training run, each complete or absent.

A run has no random state to save (see :mod:`stepdistill.randomness`), so a checkpoint is named groups of tensors and a
small JSON state. Three rules make it survive a kill or a full disk at any time:

1. It is written under another name, flushed, then renamed. A folder called ``checkpoint-<step>`` is therefore complete.
2. ``manifest.json`` is written last, with the size and the SHA-256 of every file and of itself. safetensors notices a
   truncated file but not a flipped bit, and a run must not resume from damaged weights.
3. Older checkpoints are removed only after the newer one is on the disk.

``output_dir/checkpoint-500/``: ``<group>.safetensors`` ..., ``state.json``, ``manifest.json``. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.files.hashing import sha256_of
from stepdistill.files.reading import read_json
from stepdistill.files.schema import ConfigError, convert
from stepdistill.files.words import nearest


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found, verified or restored; the message names the file or the entry."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest tells about a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``."""

    step: int
    files: dict[str, FileRecord]
    versions: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have all been verified; its tensors are read on demand."""

    path: Path
    step: int
    state: Any
    """What ``state.json`` holds, as the type that the caller asked for."""

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Return the tensors of one group, on the CPU, with the dtypes and values they were saved with.

        Raises:
            CheckpointError: if there is no such group, or its file cannot be read.
        """
        path = self.path / f"{group}.safetensors"
        if not path.is_file():
            groups = [file.stem for file in self.path.glob("*.safetensors")]
            raise CheckpointError(f"{path}: no such group{nearest(group, groups)}")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error


# ----------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    spare: int | None = None,
) -> Path:
    """Write ``output_dir/checkpoint-<step>``, then remove the oldest ones. Only the main process may call this.

    Args:
        output_dir: the run's folder, made if needed.
        step: optimizer steps done; above that of every checkpoint in the folder.
        groups: file name (letters, digits, ``_ - .``) -> tensors, on any device, in any layout; tensors that share
            memory are stored once each.
        state: JSON values with text keys; tuples come back as lists.
        keep: how many checkpoints stay, at least 1; with 2, a damaged newest one costs an interval and not the run.
        spare: the newest checkpoint of this step or an earlier one stays as well.

    Raises:
        CheckpointError: if it cannot be written. Earlier ones are then untouched, and nothing half-written remains.
    """
    output_dir = Path(output_dir)
    final = output_dir / f"checkpoint-{step}"
    if keep < 1:
        raise CheckpointError(f"keep: expected at least 1, got {keep}")
    for newer in _checkpoints(output_dir)[-1:]:
        if _step(newer) >= step:  # two histories in one folder: rotation could not tell which is old
            raise CheckpointError(f"{final}: {newer.name} is there already; move it away or use another output_dir")
    temporary = _temporary(final)
    try:
        _write(temporary, step, groups, state)
        os.rename(temporary, final)
        _fsync(output_dir)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{final}: cannot be written ({_mebibytes(groups):.1f} MiB needed): {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(output_dir, keep, spare)
    return final


def _mebibytes(groups: Mapping[str, Mapping[str, Tensor]]) -> float:
    size = 0
    for tensors in groups.values():
        size += sum(tensor.nbytes for tensor in tensors.values())
    return size / 2**20


def _write(folder: Path, step: int, groups: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    for group, tensors in groups.items():
        assert re.fullmatch(r"[\w.-]+", group), f"{group!r} is not a file name"
        save_file(_storable(tensors), folder / f"{group}.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = sorted(folder.iterdir())
    for path in files:
        _fsync(path)
    manifest: dict[str, Any] = {"step": step, "files": {}, "versions": {}}
    for path in files:
        manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    for package in ("torch", "diffusers", "safetensors"):
        manifest["versions"][package] = version(package)
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    _fsync(folder / "manifest.json")
    _fsync(folder)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors stores them: on the CPU, contiguous, no two in the same memory."""
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return stored


def _prune(output_dir: Path, keep: int, spare: int | None) -> None:
    """Remove what is old; the new checkpoint is safe, so an error is a warning, and the next save tries again."""
    try:
        _remove_old(output_dir, keep, spare)
    except OSError as error:
        warnings.warn(f"{output_dir}: an old checkpoint cannot be removed: {error}", stacklevel=3)


def _remove_old(output_dir: Path, keep: int, spare: int | None) -> None:
    spared = None
    for path in _checkpoints(output_dir):
        if spare is not None and _step(path) <= spare:
            spared = path
    for path in _checkpoints(output_dir)[:-keep]:
        if path == spared:
            continue
        os.rename(path, _temporary(path))  # so that a half-removed checkpoint never has a checkpoint's name
    for path in output_dir.glob("checkpoint-*.tmp-*"):
        shutil.rmtree(path)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first; 1000 comes after 500."""
    folders = filter(_is_checkpoint, output_dir.glob("checkpoint-*"))
    return sorted(folders, key=_step)


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d{1,18}", path.name) is not None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def _fsync(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------- reading


def latest_checkpoint(output_dir: str | Path, hint: Any = dict[str, Any]) -> Checkpoint | None:
    """Return the newest valid checkpoint of a run, or None if the run never completed one.

    An invalid one is renamed to ``*.corrupt`` with a warning that names the file at fault, and the next older one is
    tried. In a distributed run the main process calls this, and the others :func:`load_checkpoint` with its ``path``.

    Args:
        output_dir: the run's folder.
        hint: the type of the state.

    Raises:
        CheckpointError: if there were checkpoints and none is valid. Only the user may decide to start afresh.
    """
    output_dir = Path(output_dir)
    problems = []
    for path in reversed(_checkpoints(output_dir)):
        try:
            return load_checkpoint(path, hint)
        except CheckpointError as error:
            problems.append(str(error))
            aside = _set_aside(path, "corrupt")
            warnings.warn(f"{error}; renamed to {aside.name}, trying the next older checkpoint", stacklevel=2)
    set_aside = [*sorted(output_dir.glob("checkpoint-*.corrupt")), *sorted(output_dir.glob("checkpoint-*.diverged"))]
    problems = problems or list(map(str, set_aside))
    if problems:
        remedy = "restore one, or remove the *.corrupt and *.diverged folders to start afresh"
        raise CheckpointError(f"{output_dir}: no valid checkpoint is left; {remedy}:\n  " + "\n  ".join(problems))
    return None


def set_aside_later(output_dir: Path, step: int) -> str:
    """Rename the checkpoints of later steps than ``step`` to ``*.diverged``; return a sentence about what is left."""
    names = []
    for path in _checkpoints(output_dir):
        if _step(path) > step:
            names.append(_set_aside(path, "diverged").name)
    left = _checkpoints(output_dir)
    kept = f"{left[-1].name} is the last good checkpoint" if left else f"No checkpoint is as old as step {step}"
    return f"{kept}; set aside: {', '.join(names)}" if names else kept


def load_checkpoint(path: str | Path, hint: Any = dict[str, Any]) -> Checkpoint:
    """Verify the checkpoint at ``path``, every byte of it, and return it; its state is of the type ``hint``.

    Raises:
        CheckpointError: if it is missing or invalid, naming the first file at fault. There is no fallback.
    """
    path = Path(path)
    if not path.is_dir():
        problem = "expected a folder, got a file" if path.exists() else "no such checkpoint"
        names = [checkpoint.name for checkpoint in _checkpoints(path.parent)]
        raise CheckpointError(f"{path}: {problem}{nearest(path.name, names)}")
    manifest = _read_manifest(path / "manifest.json")
    if _is_checkpoint(path) and _step(path) != manifest.step:
        raise CheckpointError(f"{path}: its manifest is of step {manifest.step}; the folder was renamed")
    for name, recorded in manifest.files.items():
        _verify(path / name, recorded)
    try:
        return Checkpoint(path, manifest.step, read_json(path / "state.json", hint))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _verify(file: Path, recorded: FileRecord) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    try:
        if (size := file.stat().st_size) != recorded.size:
            raise CheckpointError(f"{file}: expected {recorded.size} bytes, got {size}")
        if sha256_of(file) != recorded.sha256:
            raise CheckpointError(f"{file}: the content has changed since it was written (SHA-256 differs)")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error


def _read_manifest(path: Path) -> Manifest:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    try:
        content = read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a complete manifest ({error})") from error
    if content.pop("sha256", None) != _digest(content):
        raise CheckpointError(f"{path}: not a complete manifest (its own SHA-256 does not match)")
    try:
        return convert(content, Manifest)
    except ConfigError as error:
        raise CheckpointError(f"{path}: not a complete manifest ({error.problems[0]})") from error


def _set_aside(path: Path, why: str) -> Path:
    aside = path.with_name(f"{path.name}.{why}")
    if aside.exists():
        aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.{why}")
    try:
        return path.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be renamed to {aside.name}: {error.strerror}") from error
