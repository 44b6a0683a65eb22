"""Writing an export's folder: it appears complete, takes the place of an earlier export, and of nothing else.

Beside the folder, ``<name>.partial`` is being written and ``<name>.old`` is being removed. Both hold the contract from
their first file to their last, so that what a killed process left is told from a folder of the user's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from stepdistill.export.contract import CONTRACT
from stepdistill.loading.index import INDEX

SIGNS_OF_MORE = (".git", "config.yaml", "checkpoint-*")
"""What a repository and the folder of a run hold; they stay even where an export was put into them."""


def check_replaceable(folder: Path, keep: tuple[str | Path, ...] = ()) -> None:
    """Raise ``ValueError`` unless an export may be written to ``folder``: it is new, empty, or itself an export.

    Nor may it lie in another pipeline: what replaces that would remove it. Beside it, nothing of the
    user's may have the names that are used while it is written.

    Args:
        folder: where to write.
        keep: files and folders that must not be replaced, wherever they are: the run, its teacher.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_symlink():
        raise ValueError(f"{folder}: expected a folder for the export, got a link to {folder.readlink()}")
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{folder}: expected a folder for the export, but {place} is a file")
    for place in folder.parents:
        if (place / INDEX).is_file():
            raise ValueError(f"{folder}: expected a folder outside of pipelines, got one in {place}; choose another")
    for path in keep:
        if Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder}: the export would replace {path}; choose another folder")
    if not (is_export(folder) or _is_empty(folder)):
        raise ValueError(
            f"{folder}: expected a new or empty folder, or an earlier export, which the new one replaces; this folder "
            "holds other files and stays as it is: choose another"
        )
    for sign in SIGNS_OF_MORE:
        for found in sorted(folder.glob(sign)):
            raise ValueError(f"{folder}: holds more than an export, {found.name}; choose another folder")
    for place in _beside(folder):
        _check_left(place)


def is_export(folder: Path) -> bool:
    """Return whether a folder is an export: it holds a contract and an index."""
    return (folder / CONTRACT).is_file() and (folder / INDEX).is_file()


def _is_empty(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write an export to, contract first; it takes the place of ``folder`` if nothing is raised.

    An earlier export is removed last: whenever the process ends, either export is there, at its place or beside it.

    Raises:
        ValueError: if ``folder`` is no export, as :func:`check_replaceable` does, or something else is in the way.
    """
    folder = Path(os.path.abspath(folder))
    partial, old = _beside(folder)
    _take_up(folder, old)
    check_replaceable(folder)
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        _swap(partial, folder, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Return where an export is written, and where an earlier one waits to be removed."""
    return folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")


def _check_left(place: Path) -> None:
    """Raise ``ValueError`` unless nothing is at a place beside an export, or what a killed process left there."""
    if not os.path.lexists(place):
        return
    if place.is_symlink() or not place.is_dir() or not ((place / CONTRACT).is_file() or _is_empty(place)):
        raise ValueError(f"{place}: is in the way of the export and was not left by one; move it away")


def _take_up(folder: Path, old: Path) -> None:
    """Finish what a killed process began: put the earlier export back if its place is empty, otherwise remove it."""
    if is_export(old) and not folder.exists():
        old.rename(folder)
    _remove(old)


def _swap(partial: Path, folder: Path, old: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    _remove(old)


def _remove(folder: Path) -> None:
    """Remove what this module has put beside an export, the contract last; of links, this removes the links."""
    _check_left(folder)
    if not folder.exists():
        return
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != CONTRACT:
            entry.unlink()
    (folder / CONTRACT).unlink(missing_ok=True)
    folder.rmdir()
