"""Hugging Face datasets as tables: saved on disk, a folder of parquet files, or by their id on the hub.

``datasets`` 4 and later, which this package requires, run no code of a dataset: one that is a script is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stepdistill.config import fingerprint_json
from stepdistill.data.base import TABLE_KEYS, DataConfig
from stepdistill.files.schema import nearest

SPLIT = "train"
"""Split that is read unless ``data.split`` is given."""


SPLITS = "dataset_dict.json"
"""File that ``save_to_disk`` writes beside the folders of several splits."""


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder, of one split or of several."""
    one = (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    return one or (path / SPLITS).is_file()


def is_hub_id(path: Path) -> bool:
    """Whether a path can only be the id of a dataset: ``owner/name``, without a local folder ``owner``."""
    here = path.exists() or path.parent.is_dir() or path.suffix in (".npz", ".tar")
    return not here and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None


def open_table(path: Path, config: DataConfig) -> tuple[Any, str | None]:
    """Return a ``datasets.Dataset``, and its version: the hub's commit, or a hash of the names and sizes of its files.

    Args:
        path: of a saved dataset, a folder of parquet files, or an id on the hub.
        config: the section, which chooses among splits, subsets and revisions.

    Raises:
        ValueError: if there is no such dataset, split, subset or revision; the message tells what was tried.
    """
    import datasets

    if (path / SPLITS).is_file():
        folder = _saved_split(path, config)
        return datasets.load_from_disk(str(folder)), f"{_content(folder, '*.arrow')} {folder.name}"
    if is_saved(path):
        refuse_keys(config, TABLE_KEYS, f"{path} is one split, saved on disk")
        return datasets.load_from_disk(str(path)), None
    if path.is_dir():
        refuse_keys(config, ("revision",), f"{path} is a folder, and only the hub has revisions")
        table = _load(path.absolute(), config)  # a bare name could be a format's, such as "parquet"
        return table, f"{_content(path, '*.parquet')} {table.config_name}/{table.split}"
    table = _load(path, config)
    commit = Path(table.cache_files[0]["filename"]).parent.name  # .../owner___name/<subset>/<version>/<commit>/*.arrow
    if config.revision not in (None, commit):  # without a network, datasets takes whichever it has
        raise ValueError(
            f"data.revision: expected {config.revision}, which is not available without the hub, got {path} at {commit}"
        )
    return table, f"{commit} {table.config_name}/{table.split}"


def refuse_keys(config: DataConfig, keys: tuple[str, ...], why: str) -> None:
    """Raise ``ValueError`` if one of these keys is given, because nothing would read it."""
    for key in keys:
        if (value := getattr(config, key)) is not None:
            raise ValueError(f"data.{key}: got {value!r}, but {why}")


def _content(folder: Path, pattern: str) -> str:
    files = sorted(folder.rglob(pattern))
    return fingerprint_json([[str(file.relative_to(folder)), file.stat().st_size] for file in files])


def _saved_split(path: Path, config: DataConfig) -> Path:
    refuse_keys(config, ("subset", "revision"), f"{path} is saved on disk")
    split = config.split or SPLIT
    splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if split not in splits:
        raise ValueError(f"data.split: {path} has no {split!r}{nearest(split, splits)}; expected one of {splits}")
    return path / split


def _load(path: Path, config: DataConfig) -> Any:
    import datasets

    split = config.split or SPLIT
    try:
        return datasets.load_dataset(
            str(path), config.subset, split=split, revision=config.revision, keep_in_memory=False
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        if path.is_dir():
            raise ValueError(f"data.path: {path}, split {split!r}, subset {config.subset!r}: {reason}") from error
        call = f"{str(path)!r}, {config.subset!r}, split={split!r}"
        raise ValueError(
            f"data.path: {path}: no such file or folder here, and datasets.load_dataset({call}) failed: {reason}. "
            f"Run that call where it works, end it with .save_to_disk({path.name!r}), and give that folder as data.path"
        ) from error
