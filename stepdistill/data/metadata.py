"""A folder's table of its images, ``metadata.jsonl``, ``.csv`` or ``.parquet``, and its folders of splits.

Both follow the convention of ``datasets``' imagefolder: ``file_name`` (or ``image_file_name``) is a path below the
table's folder, and a folder ``train`` beside ``validation`` or ``test`` is the split that is read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stepdistill.data.columns import Column, Texts, read_label, read_texts
from stepdistill.data.hf_datasets import reading_as
from stepdistill.data.image_files import is_image
from stepdistill.data.loader import TOLERATED, TOLERATED_SHARE
from stepdistill.data.text import json_lines, table_rows
from stepdistill.files.words import nearest, visible

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of folders by the split that they hold."""


MAX_ROWS = 100_000_000


# ---------------------------------------------------------------------------------------------- splits


def split_folder(path: Path, split: str | None, suffixes: tuple[str, ...]) -> Path | None:
    """Return the folder of a split, ``train`` by default; None if the sub-folders are not splits.

    They are if one is called ``train`` or ``training``, and all have names of splits. What is left out is said.

    Args:
        path: the folder of all splits.
        split: the one that is asked for.
        suffixes: endings of samples, of which those beside the splits are left out.

    Raises:
        ValueError: if there are splits, but not this one.
    """
    entries = list(path.iterdir())
    found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    known = {alias: name for name, aliases in SPLITS.items() for alias in aliases}
    if not {"train", "training"} & set(map(str.lower, found)) or not set(map(str.lower, found)) <= known.keys():
        return None
    asked = (split or "train").lower()
    chosen = [name for name in found if name.lower() == asked] or [
        name for name in found if known[name.lower()] == known.get(asked)
    ]
    if not chosen:
        raise ValueError(f"data.split: {path} has no {split!r}{nearest(asked, found)}; expected one of {found}")
    left_out = [name for name in found if name != chosen[0]]
    if strays := sum(is_image(entry.name, suffixes) for entry in entries if not entry.is_dir()):
        left_out.append(f"{strays} files beside the splits")
    if left_out:
        names = ", ".join(left_out)
        warnings.warn(f"{path}: reading the split {chosen[0]}; left out: {names} (see data.split)", stacklevel=2)
    return path / chosen[0]


# ------------------------------------------------------------------------------------------- the table


def metadata_file(folder: Path) -> Path | None:
    """Return the table of a folder's images, if there is one: the first of ``.jsonl``, ``.csv`` and ``.parquet``."""
    for suffix in (".jsonl", ".csv", ".parquet"):
        if (file := folder / f"metadata{suffix}").is_file():
            return file
    return None


def read_metadata(file: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a table by ``file:line`` or ``file[row]``. An empty cell of a ``.csv`` has no value.

    Raises:
        ValueError: naming the file, and the line or row.
    """
    match file.suffix:
        case ".jsonl":
            return json_lines(file)
        case ".csv":
            rows = {}
            for where, row in table_rows(file).items():
                rows[where] = {key: value or None for key, value in row.items()}
            return rows
    return dict(_parquet_rows(file))


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import parquet

    with reading_as(file, "parquet"), parquet.ParquetFile(file) as table:
        if table.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"expected at most {MAX_ROWS:,} rows, got {table.metadata.num_rows:,}")
        rows = table.read().to_pylist()
    for number, row in enumerate(rows):
        yield f"{file}[{number}]", row


def find_files(
    rows: Mapping[str, Mapping[str, Any]], file: Path, images: Iterable[str], keys: Iterable[str], *, skip: bool
) -> dict[str, str]:
    """Return the image's path of every row that has one, and say how many images and rows are left over.

    Args:
        rows: of the table, by their name for errors.
        file: the table.
        images: paths of all images in its folder.
        keys: columns that may hold the path; the first that exists does.
        skip: whether rows without an image may be left out.

    Raises:
        ValueError: if a row names no file, or rows without an image may not be left out, or are 10 and 1% of all.
    """
    known, found, missing = set(map(os.path.normpath, images)), {}, []
    left_over = set(known)
    for where, row in rows.items():
        path = str(file.parent / _file_name(row, keys, where))
        plain = os.path.normpath(path)
        if plain in known or os.path.isfile(path):
            found[where] = path
            left_over.discard(plain)
        else:
            missing.append(f"{where}: {visible(path)}")
    _report_missing(missing, len(rows), file, skip)
    if left_over:
        first = f"the first is {visible(min(left_over))}"
        warnings.warn(f"{file}: {len(left_over)} images have no row and are left out; {first}", stacklevel=4)
    return found


def _file_name(row: Mapping[str, Any], keys: Iterable[str], where: str) -> str:
    keys = list(keys)
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise ValueError(f"{where}: no key {keys[0]!r}{nearest(keys[0], row)}")
    name = row[key]
    if not isinstance(name, str) or "\0" in name:
        raise ValueError(f"{where}: {key!r}: expected the path of an image, got {name!r:.60}")
    return name


def _report_missing(missing: list[str], count: int, file: Path, skip: bool) -> None:
    if not missing:
        return
    said = f"{file}: {len(missing)} of {count} rows name an image that is not there; the first is {missing[0]}"
    if not skip:
        raise ValueError(f"{said} (data.bad_files=skip leaves them out)")
    if len(missing) == count or (len(missing) >= TOLERATED and len(missing) > TOLERATED_SHARE * count):
        raise ValueError(f"{said}; more than {TOLERATED_SHARE:.0%} are too many to leave out")
    warnings.warn(f"{said}; they are left out", stacklevel=5)


def caption_column(rows: Mapping[str, Mapping[str, Any]], key: str | None) -> Column[Texts]:
    """Return the captions of rows under ``key``; they are missing where a row has no such key."""
    column = Column[Texts]()
    if key is None:
        return column
    for where, row in rows.items():
        column.add(read_texts, row.get(key), f"{where}: {key!r}")
    return column


def label_column(rows: Mapping[str, Mapping[str, Any]], key: str | None) -> Column[int]:
    """Return the labels of rows under ``key``, which every row has to have."""
    column = Column[int]()
    if key is None:
        return column
    for where, row in rows.items():
        column.add(_label, row, key, where)
    return column


def _label(row: Mapping[str, Any], key: str, where: str) -> int:
    if key not in row:
        raise ValueError(f"{where}: no key {key!r}{nearest(key, row)}")
    return read_label(row[key], f"{where}: {key!r}")
