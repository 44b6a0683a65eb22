"""Hugging Face datasets as tables: saved on disk, parquet (a folder of files, or one), or by their id on the hub.

``datasets`` 4 and later, which this package requires, run no code of a dataset: one that is a script is an error.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepdistill.config import fingerprint_json
from stepdistill.data.base import TABLE_KEYS, DataConfig
from stepdistill.data.image_files import visible_files
from stepdistill.files.reading import read_json
from stepdistill.files.schema import convert
from stepdistill.files.words import nearest

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
        path: of a saved dataset, a folder of parquet files, one of them, or an id on the hub.
        config: the section, which chooses among splits, subsets and revisions.

    Raises:
        ValueError: if there is no such dataset, split, subset or revision, or a file is damaged; the message names it.
    """
    if (path / SPLITS).is_file():
        folder = _saved_split(path, config)
        return _saved(folder), f"{_content(folder, '*.arrow')} {folder.name}"
    if is_saved(path):
        refuse_keys(config, TABLE_KEYS, f"{path} is one split, saved on disk")
        return _saved(path), None
    if path.is_file():
        refuse_keys(config, TABLE_KEYS, f"{path} is one file")
        return _load_file(path), fingerprint_json([path.name, path.stat().st_size])
    if path.is_dir():
        refuse_keys(config, ("revision",), f"{path} is a folder, and only the hub has revisions")
        _check_parquet(visible_files(path, "**/*.parquet"))
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
    files = visible_files(folder, f"**/{pattern}")
    return fingerprint_json([[str(file.relative_to(folder)), file.stat().st_size] for file in files])


def _saved_split(path: Path, config: DataConfig) -> Path:
    refuse_keys(config, ("subset", "revision"), f"{path} is saved on disk")
    split = config.split or SPLIT
    splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    if split not in splits:
        raise ValueError(f"data.split: {path} has no {split!r}{nearest(split, splits)}; expected one of {splits}")
    return path / split


def _saved(folder: Path) -> Any:
    """Return what ``save_to_disk`` wrote; the files are checked first, because its reader names none."""
    import datasets

    read_json(folder / "dataset_info.json")
    state = read_json(folder / "state.json")
    for entry in convert(state.get("_data_files"), list[dict[str, str]], f"{folder / 'state.json'}: _data_files"):
        _check_arrow(folder / entry.get("filename", ""))
    with reading_as(folder, "a saved dataset"):
        return datasets.load_from_disk(str(folder))


def _check_arrow(file: Path) -> None:
    """Raise ``ValueError`` with its name if an arrow file cannot be read; its content stays on the disk."""
    import pyarrow

    if not file.is_file():
        raise ValueError(f"{file}: no such file; the saved dataset is not complete")
    with reading_as(file, "a saved dataset"), pyarrow.memory_map(str(file)) as source:
        pyarrow.ipc.open_stream(source).read_all()


def _check_parquet(files: list[Path]) -> None:
    """Raise ``ValueError`` with its name for a file whose footer cannot be read."""
    from pyarrow import parquet

    for file in files:
        with reading_as(file, "parquet"):
            parquet.read_metadata(file)


@contextlib.contextmanager
def reading_as(path: Path, what: str) -> Iterator[None]:
    """Turn what arrow and datasets raise for a damaged file into a ``ValueError`` that names it."""
    import datasets
    import pyarrow

    damage = (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException, datasets.exceptions.DatasetsError)
    try:
        yield
    except damage as error:
        raise ValueError(f"{path}: cannot be read as {what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return what an error and its causes say, in one line."""
    said = [str(error)]
    while (cause := error.__cause__) is not None:
        error = cause
        said.append(str(error))
    return " ".join(" ".join(dict.fromkeys(said)).split())


def _load_file(path: Path) -> Any:
    import datasets

    _check_parquet([path])
    with reading_as(path, "parquet"):
        return datasets.load_dataset("parquet", data_files=str(path.absolute()), split=SPLIT)


def _load(path: Path, config: DataConfig) -> Any:
    import datasets

    split = config.split or SPLIT
    try:
        return datasets.load_dataset(
            str(path), config.subset, split=split, revision=config.revision, keep_in_memory=False
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = _reason(error)
        if path.is_dir():
            raise ValueError(f"data.path: {path}, split {split!r}, subset {config.subset!r}: {reason}") from error
        call = f"{str(path)!r}, {config.subset!r}, split={split!r}"
        raise ValueError(
            f"data.path: {path}: no such file or folder here, and datasets.load_dataset({call}) failed: {reason}. "
            f"Run that call where it works, end it with .save_to_disk({path.name!r}), and give that folder as data.path"
        ) from error
