"""Files that are replaced in one step."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; it replaces ``path`` if nothing is raised.

    A reader therefore sees the old file or the new one, never a partial one, also after a power cut. What lies at the
    temporary path is removed first: if it is a link, nothing is written to where it leads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn what the system says of a failed write into a sentence.

    Raises:
        ValueError: naming ``path`` and the reason, such as a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written: {error}") from error


def check_writable(path: Path) -> None:
    """Check, before hours of work, that something can be written at ``path``; nothing is left there.

    Raises:
        ValueError: if its folder, or the nearest one above it that exists, is no folder, is read-only, or is full.
    """
    with writing_to(path):
        folder = path if path.is_dir() else _nearest_folder(path)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()


def check_new_file(place: str | Path | None, ending: str = "") -> None:
    """Check the same of a file, which replaces an earlier one but no folder; None is no file.

    Raises:
        ValueError: as :func:`check_writable` does, or if ``place`` is a folder or has another ending.
    """
    if place is None:
        return
    path = Path(place)
    if not path.name.endswith(ending):
        raise ValueError(f"{path}: expected a file to write whose name ends in {ending}, got {path.name!r}")
    if path.is_dir():
        raise ValueError(f"{path}: expected a file to write, got a folder")
    check_writable(path)


def _nearest_folder(path: Path) -> Path:
    """Return the nearest thing above ``path`` that exists; raise ``NotADirectoryError`` if it is no folder."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file")
    return folder
