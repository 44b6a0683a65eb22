"""The index of a pipeline's folder, ``model_index.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.files.reading import read_json

INDEX = "model_index.json"


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of ``model_index.json``; empty if there is none, as for a network without a pipeline."""
    path = folder / INDEX
    return read_json(path) if path.is_file() else {}


def parts(folder: Path) -> list[str]:
    """Return the parts of a pipeline that have a folder in its folder."""
    return list(part_entries(read_index(folder)))


def part_entries(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the entries of an index that name the class of a part, by the part's name."""
    found = {}
    for name, entry in index.items():
        if type(entry) is list and name.isidentifier() and name[0] != "_" and type(entry[0] if entry else 0) is str:
            found[name] = entry
    return found


def own_class(folder: Path) -> tuple[str, str] | None:
    """Return module and name of the folder's custom pipeline class; None if its class is diffusers' or missing."""
    name = read_index(folder).get("_class_name")
    return (str(name[0]), str(name[-1])) if type(name) is list and name else None
