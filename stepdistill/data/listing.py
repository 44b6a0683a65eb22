"""The samples that a path holds: images not yet decoded, their labels and captions.

===================================  ===============================================================================
path                                 samples
===================================  ===============================================================================
``.npz``                             ``images`` uint8 (N, H, W) or (N, H, W, C), and optionally ``labels`` int (N,),
                                     ``captions`` str (N,), or (N, K) for K captions an image; or ``arr_0`` and
                                     ``arr_1``, as ADM's samplers call the images and labels
Hugging Face dataset                 its ``image`` column, and optionally ``label``, ``text``; see
or ``.parquet``                      :mod:`stepdistill.data.hf_datasets`
folder with ``metadata.jsonl``,      a row an image: ``file_name``, and optionally ``label``, ``text``; see
``.csv`` or ``.parquet``             :mod:`stepdistill.data.metadata`
``.tar``, or a folder of them         WebDataset samples, see :mod:`stepdistill.data.webdataset`
folder of folders                    one class per sub-folder, numbered by name as text ("10" < "9")
folder                               images without labels; captions, if a ``.txt`` lies beside every image
address (``https://...``)             a ``.tar`` or ``.parquet``, several, or a folder of them, read in ranges
folder of ``train`` and other splits  any of these in it, see :func:`~stepdistill.data.metadata.split_folder`
===================================  ===============================================================================

A folder of parquet files is a Hugging Face dataset if they are named as on the hub (``train-00000-of-00002.parquet``),
or no images lie beside them; a ``metadata.jsonl`` or a tar in it takes precedence over both, and both over other
metadata. Nothing is unpickled. Hidden folders and files are ignored, other files that are not images are counted
(:mod:`stepdistill.data.image_files`), and labels and captions that cannot be used (words for labels, say) are ignored
if the teacher does not need them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepdistill.assets import EMBEDDED
from stepdistill.data.archives import read_archive
from stepdistill.data.base import TABLE_KEYS, DataConfig
from stepdistill.data.clips import VIDEO_SUFFIXES
from stepdistill.data.columns import Column, Texts
from stepdistill.data.hf_datasets import is_hub_id, is_saved, open_table, refuse_keys
from stepdistill.data.image_files import IMAGE_SUFFIXES, Found, count_words, find_images, visible_files
from stepdistill.data.metadata import (
    caption_column,
    find_files,
    label_column,
    metadata_file,
    read_metadata,
    split_folder,
)
from stepdistill.data.remote import addresses_of, downloaded, in_parallel, is_address, shown, version_of
from stepdistill.data.tables import caption_cells, image_cells, label_cells
from stepdistill.data.tars import MAX_FILE_BYTES, TarMember, fetch
from stepdistill.data.text import read_text
from stepdistill.data.webdataset import read_tars
from stepdistill.files.words import closest, nearest, visible

STRAY = -1  # label of an image that lies beside the class folders


COLUMN_KEYS = ("label_column", "caption_column")
"""Keys that choose among the columns of a table."""

COMPRESSED_TARS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The samples of a path."""

    images: Sequence[Any] | np.ndarray
    """Each in a form that :func:`~stepdistill.data.decoding.read_pixels` takes."""
    labels: np.ndarray | None = None
    captions: Sequence[Texts] | None = None
    """Of every sample none, one or several, see :mod:`stepdistill.data.columns`."""
    no_labels: str | None = None
    """Why there are no labels, although there is a column of them."""
    no_captions: str | None = None
    """Why there are no captions, likewise."""
    num_folders: int | None = None
    """Number of classes, if labels only number the sub-folders."""
    version: str | None = None
    """Which content the path had, if the path alone does not tell."""
    array_shape: tuple[int, ...] | None = None
    """(H, W, C) of all images, if they are one array."""
    fetch: Callable[[Sequence[int]], Mapping[int, Any]] | None = None
    """Returns the images of some rows with their content, which is asked for together; None for files here."""
    left_out: str = ""
    """How many other files of which endings the path holds."""


def sample_name(images: Any, row: int, path: str | Path | None) -> str:
    """Return an image's name for messages: its file, or its row in ``path``."""
    if type(images) is list:  # of files; a table would read the image, which may be far away, for its name
        return str(images[row])
    return f"{shown(str(path)) if is_address(str(path)) else path}[{row}]"


def list_samples(config: DataConfig) -> Listing:
    """Return the samples at ``config.path``, in any of the forms above.

    Raises:
        ValueError: if it has none of these forms, or breaks the rules of its form; it names the file.
    """
    if is_address(str(config.path)):
        return _at_address(str(config.path), config)
    path = Path(str(config.path))
    if config.download:
        raise ValueError(f"data.download: expected an address as data.path, got {path}")
    if is_saved(path) or is_hub_id(path) or _holds_parquet(path):
        return _table(path, config)
    may_have_splits = path.is_dir() and not visible_files(path, "*.tar")
    if may_have_splits and (split := split_folder(path, config.split, suffixes_of(config))):
        refuse_keys(config, TABLE_KEYS[1:], f"{path} is not a Hugging Face dataset")
        return _split(split, config)
    refuse_keys(config, TABLE_KEYS, f"{path} is not a Hugging Face dataset")
    if path.is_file() and path.suffix == ".npz":
        refuse_keys(config, COLUMN_KEYS, f"{path} is an .npz, whose arrays have fixed names")
        return _npz(path)
    if path.is_file() and path.suffix == ".tar":
        return _tars([str(path)], config)
    if not path.is_dir():
        raise ValueError(f"data.path: {path}: {_why_not(path)}")
    return _folder(path, config)


def suffixes_of(config: DataConfig) -> tuple[str, ...]:
    """Return the endings of the files that are samples: of images, or of videos."""
    return IMAGE_SUFFIXES if config.fps is None else VIDEO_SUFFIXES


def _why_not(path: Path) -> str:
    if path.name.lower().endswith(COMPRESSED_TARS):
        return "expected an uncompressed tar, whose images are read where they lie; decompress it first"
    if path.exists():
        return "expected a folder, an .npz, a .tar or a .parquet, got another file"
    names = [*EMBEDDED, *(os.listdir(path.parent) if path.parent.is_dir() else [])]
    return f"no such file or folder{closest(path.name, names)}"


def _npz(path: Path) -> Listing:
    found = read_archive(path)
    return Listing(
        found.images, found.labels, array_shape=found.images.shape[1:], no_labels=found.no_labels,
        **_captions(found.captions),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- folders


def _split(folder: Path, config: DataConfig) -> Listing:
    """Return the samples of a split's folder, which may share a table with the others."""
    table = metadata_file(folder.parent)
    if table is None or metadata_file(folder) is not None:
        return _folder(folder, config)
    return _metadata(table, config, within=folder)


def _folder(folder: Path, config: DataConfig) -> Listing:
    table = metadata_file(folder)
    tars = [str(tar) for tar in visible_files(folder, "*.tar")]
    if table is not None and (table.suffix == ".jsonl" or not tars):
        return _metadata(table, config, within=folder)
    if not tars:
        refuse_keys(config, COLUMN_KEYS, f"{folder} has no metadata.jsonl or metadata.csv")
        return _images(folder, config)
    _warn_of_compressed(folder)
    return _tars(tars, config)


def _warn_of_compressed(folder: Path) -> None:
    names = [entry.name for entry in sorted(folder.iterdir()) if entry.name.lower().endswith(COMPRESSED_TARS)]
    if names:
        warnings.warn(f"{folder}: left out {len(names)} compressed tars; the first is {names[0]}", stacklevel=2)


def _images(folder: Path, config: DataConfig) -> Listing:
    found = _found(folder, config)
    files, left_out = found.images, count_words(found.left_out)
    captions = _caption_files(files)
    folders = [_class_folder(file, folder) for file in files]
    classes = sorted({*filter(None, folders)})
    if not classes:
        return Listing(files, left_out=left_out, **_captions(captions))
    number: dict[str | None, int] = {None: STRAY}
    for label, name in enumerate(classes):
        number[name] = label
    labels = np.array([number[name] for name in folders])
    return Listing(files, labels, num_folders=len(classes), left_out=left_out, **_captions(captions))


def _class_folder(file: str, folder: Path) -> str | None:
    """Return the sub-folder of ``folder`` that holds a file, at any depth; None if it lies in ``folder`` itself."""
    name, separator, _ = file[len(str(folder)) + 1 :].partition(os.sep)
    return name if separator else None


def _caption_files(images: Sequence[str]) -> Column[Texts]:
    """Return the text beside every image (``a.txt`` beside ``a.png``), where there is one."""
    column = Column[Texts]()
    for image in images:
        column.add(_caption_file, Path(image).with_suffix(".txt"))
    return column


def _captions(column: Column[Texts]) -> dict[str, Any]:
    """Return the fields of a listing about captions; where every one is missing, there are none."""
    values = column.values
    return {"captions": values if any(values or ()) else None, "no_captions": column.problem}


def _caption_file(file: Path) -> Texts:
    return (" ".join(read_text(file).split()),) if file.is_file() else ()


def _found(folder: Path, config: DataConfig) -> Found:
    found = find_images(folder, suffixes_of(config))
    found.warn(folder)
    return found


def _metadata(file: Path, config: DataConfig, within: Path) -> Listing:
    rows = read_metadata(file)
    known = sorted(set().union(*rows.values()))
    label = _column(config.label_column, "label", known, str(file))
    caption = _column(config.caption_column, "text", known, str(file))
    keys = ("file_name", f"{config.image_column}_file_name")
    found = find_files(rows, file, _found(file.parent, config).images, keys, skip=config.bad_files == "skip")
    if within != file.parent:
        found = {where: image for where, image in found.items() if within in Path(image).parents}
    rows = {where: rows[where] for where in found}
    labels, captions = label_column(rows, label), caption_column(rows, caption)
    _say_if_absent(captions, caption, known, str(file))
    return Listing(
        list(found.values()),
        None if label is None or labels.values is None else np.array(labels.values, dtype=int),
        no_labels=labels.problem,
        **_captions(captions),
    )


def _column(asked: str | None, usual: str, known: Iterable[str], where: str) -> str | None:
    """Return the column asked for, which must exist; else the usual one if it exists."""
    known = list(known)
    if asked and asked not in known:
        raise ValueError(f"{where}: no column {asked!r}{nearest(asked, known)}")
    return asked or (usual if usual in known else None)


def _say_if_absent(captions: Column[Texts], name: str | None, known: Sequence[str], where: str) -> None:
    """Note why there are no captions, if there is no column of them."""
    if name is None:
        captions.fail(f"{where}: no column 'text'{nearest('text', known)}; data.caption_column names another")


def _tars(tars: Sequence[str], config: DataConfig) -> Listing:
    found = read_tars(tars, suffixes_of(config), config.caption_column, config.label_column)
    if found.left_out:
        warnings.warn(f"{config.path}: left out, because no such files are read: {found.left_out}", stacklevel=2)
    labels, problem = found.labels.values, found.labels.problem
    if labels is not None and None in labels:
        first, missing = found.images[labels.index(None)], labels.count(None)
        problem = f"{visible(str(first))}: no label, but others have one ({missing} without)"
        labels, problem = None, None if missing == len(found.images) else problem
    return Listing(
        found.images,
        None if labels is None else np.array(labels, dtype=int),
        no_labels=problem,
        left_out=found.left_out,
        **_captions(found.captions),
    )


# ----------------------------------------------------------------------------------- Hugging Face datasets


def _holds_parquet(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".parquet"
    if not path.is_dir() or (path / "metadata.jsonl").is_file() or visible_files(path, "*.tar"):
        return False
    if visible_files(path, "**/*-of-*.parquet"):
        return True
    return bool(visible_files(path, "**/*.parquet")) and not find_images(path).images


def _table(path: Path, config: DataConfig) -> Listing:
    table, version = open_table(path, config)
    image, label, caption = _columns(config, table.column_names, str(path))
    labels, no_labels = label_cells(table, label, str(path))
    captions = caption_cells(table, caption, str(path))
    _say_if_absent(captions, caption, table.column_names, str(path))
    return Listing(
        image_cells(table, image, str(path)), labels, version=version, no_labels=no_labels, **_captions(captions)
    )


def _columns(config: DataConfig, known: Sequence[str], where: str) -> tuple[str, str | None, str | None]:
    """Return the names of the columns of images, labels and captions."""
    image = _column(config.image_column, "image", known, where)
    label = _column(config.label_column, "label", known, where)
    return str(image), label, _column(config.caption_column, "text", known, where)


# ------------------------------------------------------------------------------------------ at an address


def _at_address(address: str, config: DataConfig) -> Listing:
    refuse_keys(config, TABLE_KEYS[1:], f"{shown(address)} is an address")
    if config.buckets and not config.download:
        raise ValueError(
            f"data.buckets: expected none, or data.download: all images at {shown(address)} have to be read for them"
        )
    tars = [] if shown(address).endswith(".parquet") else addresses_of(address, ".tar")
    if not tars:
        return _remote_table(address, config)
    refuse_keys(config, TABLE_KEYS, f"{shown(address)} holds tars")
    version = version_of(tars)
    if config.download:
        return dataclasses.replace(_tars(in_parallel(downloaded, tars), config), version=version)
    found = _tars(tars, config)
    return dataclasses.replace(found, version=version, fetch=functools.partial(_fetch, found.images))


def _fetch(images: Any, rows: Sequence[int]) -> dict[int, TarMember]:
    return dict(zip(rows, fetch([images[row] for row in rows], MAX_FILE_BYTES), strict=True))


def _remote_table(address: str, config: DataConfig) -> Listing:
    from stepdistill.data.remote_tables import RemoteTable

    table = RemoteTable(address, config.split, download=config.download)
    image, label, caption = _columns(config, table.column_names, table.name)
    columns = table.columns([name for name in (label, caption) if name is not None])
    labels, no_labels = label_cells(columns, label, table.name)
    captions = caption_cells(columns, caption, table.name)
    _say_if_absent(captions, caption, table.column_names, table.name)
    images = table.images(image)
    return Listing(
        images, labels, version=table.version, no_labels=no_labels, fetch=images.fetch, **_captions(captions)
    )
