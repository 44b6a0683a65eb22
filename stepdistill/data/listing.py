"""The samples that a path holds: images not yet decoded, their labels and captions.

===================================  ===============================================================================
path                                 samples
===================================  ===============================================================================
``.npz``                             ``images`` uint8 (N, H, W) or (N, H, W, C), and optionally ``labels`` int (N,),
                                     ``captions`` str (N,)
Hugging Face dataset                 its ``image`` column, and optionally ``label``, ``text``; see
                                     :mod:`stepdistill.data.hf_datasets`
folder with ``metadata.jsonl``       a JSON object a line: ``file_name``, and in every line or none ``label``, ``text``
``.tar``, or a folder of them         WebDataset samples, see :mod:`stepdistill.data.webdataset`
folder of folders                    one class per sub-folder, numbered by name as text ("10" < "9")
folder                               images without labels; captions, if a ``.txt`` lies beside every image
===================================  ===============================================================================

A folder of parquet files is a Hugging Face dataset if they are named as on the hub (``train-00000-of-00002.parquet``),
or no images lie beside them; a ``metadata.jsonl`` or a tar in it takes precedence over both. Nothing is unpickled.
Hidden folders and files that are not images are ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from stepdistill.data.base import TABLE_KEYS, DataConfig
from stepdistill.data.hf_datasets import is_hub_id, is_saved, open_table, refuse_keys
from stepdistill.data.text import json_lines, read_prompts, read_text, row_value
from stepdistill.data.webdataset import TarMember, read_tars
from stepdistill.files.schema import nearest

T = TypeVar("T")


STRAY = -1  # label of an image that lies beside the class folders


IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The samples of a path."""

    images: Sequence[Any] | np.ndarray
    """Each in a form that :func:`~stepdistill.data.decoding.read_pixels` takes."""
    labels: np.ndarray | None = None
    captions: Sequence[str | None] | np.ndarray | None = None
    num_folders: int | None = None
    """Number of classes, if labels only number the sub-folders."""
    version: str | None = None
    """Which content the path had, if the path alone does not tell."""
    array_shape: tuple[int, ...] | None = None
    """(H, W, C) of all images, if they are one array."""


def sample_name(images: Any, row: int, path: str | Path | None) -> str:
    """Return an image's name for messages: its file, or its row in ``path``."""
    return str(images[row]) if isinstance(images[row], (str, TarMember)) else f"{path}[{row}]"


def list_samples(config: DataConfig) -> Listing:
    """Return the samples at ``config.path``, in any of the forms above.

    Raises:
        ValueError: if it has none of these forms, or breaks the rules of its form; it names the file.
    """
    path = Path(str(config.path))
    if is_saved(path) or is_hub_id(path) or _holds_parquet(path):
        return _table(path, config)
    refuse_keys(config, TABLE_KEYS, f"{path} is not a Hugging Face dataset")
    if path.is_file() and path.suffix == ".npz":
        return _npz(path)
    if path.is_file() and path.suffix == ".tar":
        return _tars([path], config)
    if not path.is_dir():
        raise ValueError(f"data.path: {path}: {_why_not(path)}")
    if (path / "metadata.jsonl").is_file():
        return _metadata(path / "metadata.jsonl", config)
    if tars := sorted(path.glob("*.tar")):
        return _tars(tars, config)
    return _folder(path)


def _why_not(path: Path) -> str:
    if path.exists():
        return "expected a folder, an .npz or a .tar, got another file"
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    return f"no such file or folder{nearest(path.name, difflib.get_close_matches(path.name, names, n=1))}"


# ------------------------------------------------------------------------------------------------- .npz


def _npz(path: Path) -> Listing:
    arrays = _arrays(path)
    images, labels, captions = arrays["images"], arrays.get("labels"), arrays.get("captions")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"{path}: images: expected uint8 (N, H, W) or (N, H, W, C) in [0, 255], got {images.dtype} {images.shape}"
        )
    for name, column, kinds, expected in (("labels", labels, "iu", "int"), ("captions", captions, "U", "str")):
        if column is not None and (column.dtype.kind not in kinds or column.shape != images.shape[:1]):
            raise ValueError(f"{path}: {name}: expected {expected} ({len(images)},), got {column.dtype} {column.shape}")
    images = images if images.ndim == 4 else images[..., None]
    return Listing(images, labels, captions, array_shape=images.shape[1:])


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is one bare array")
            if "images" not in archive.files:
                raise ValueError(f"no array 'images'{nearest('images', archive.files)}")
            return {name: archive[name] for name in ("images", "labels", "captions") if name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected an .npz of plain arrays: {error}") from error


# ---------------------------------------------------------------------------------------------- folders


def _folder(folder: Path) -> Listing:
    files = sorted(_image_files(folder))
    captions = _caption_files(files)
    folders = [_class_folder(file, folder) for file in files]
    classes = sorted({*filter(None, folders)})
    if not classes:
        return Listing(files, captions=captions)
    number: dict[str | None, int] = {None: STRAY}
    for label, name in enumerate(classes):
        number[name] = label
    return Listing(files, np.array([number[name] for name in folders]), captions, num_folders=len(classes))


def _class_folder(file: str, folder: Path) -> str | None:
    """Return the sub-folder of ``folder`` that holds a file, at any depth; None if it lies in ``folder`` itself."""
    name, separator, _ = file[len(str(folder)) + 1 :].partition(os.sep)
    return name if separator else None


def _caption_files(images: Sequence[str]) -> list[str | None] | None:
    """Return the text beside every image (``a.txt`` beside ``a.png``), None where there is none."""
    captions = [_caption_file(Path(image).with_suffix(".txt")) for image in images]
    return None if set(captions) <= {None} else captions


def _caption_file(file: Path) -> str | None:
    return " ".join(read_text(file).split()) if file.is_file() else None


def list_prompts(config: DataConfig) -> list[str]:
    """Return the prompts in ``config.path``: a ``.jsonl`` of objects, or any other text file, one a line.

    Raises:
        ValueError: if there is no such file, and as :func:`~stepdistill.data.text.read_prompts`.
    """
    path = Path(str(config.path))
    if not path.is_file():
        reason = "expected a file, got a folder" if path.is_dir() else _why_not(path)
        raise ValueError(f"data.path: {path}: {reason}")
    return read_prompts(path, config.caption_column or "text")


def _image_files(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in filter(_is_image, names):
            yield os.path.join(root, name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _metadata(file: Path, config: DataConfig) -> Listing:
    rows = json_lines(file)
    known = sorted(set().union(*rows.values()))
    label = _column(config.label_column, "label", known, str(file))
    caption = _column(config.caption_column, "text", known, str(file))

    def column(key: str, kind: type[T]) -> list[T]:
        return [row_value(row, key, kind, where) for where, row in rows.items()]

    return Listing(
        [str(file.parent / name) for name in column("file_name", str)],
        np.array(column(label, int)) if label else None,
        column(caption, str) if caption else None,
    )


def _column(asked: str | None, usual: str, known: Iterable[str], where: str) -> str | None:
    """Return the column asked for, which must exist; else the usual one if it exists."""
    known = list(known)
    if asked and asked not in known:
        raise ValueError(f"{where}: no column {asked!r}{nearest(asked, known)}")
    return asked or (usual if usual in known else None)


def _tars(tars: Sequence[Path], config: DataConfig) -> Listing:
    found = read_tars(tars, IMAGE_SUFFIXES, config.caption_column, config.label_column)
    captions = None if set(found.captions) <= {None} else found.captions
    unlabelled = found.labels.count(None)
    if unlabelled == 0:
        return Listing(found.images, np.array(found.labels, dtype=int), captions)
    if unlabelled < len(found.labels):
        first = found.images[found.labels.index(None)]
        raise ValueError(f"{first}: no label, but others have one ({unlabelled} without)")
    return Listing(found.images, None, captions)


# ----------------------------------------------------------------------------------- Hugging Face datasets


def _holds_parquet(path: Path) -> bool:
    if not path.is_dir() or (path / "metadata.jsonl").is_file() or any(path.glob("*.tar")):
        return False
    if any(path.rglob("*-of-*.parquet")):
        return True
    return any(path.rglob("*.parquet")) and not any(_image_files(path))


def _table(path: Path, config: DataConfig) -> Listing:
    import datasets

    table, version = open_table(path, config)
    image = _column(config.image_column, "image", table.column_names, str(path))
    label = _column(config.label_column, "label", table.column_names, str(path))
    caption = _column(config.caption_column, "text", table.column_names, str(path))
    if not isinstance(table.features[image], datasets.Image):
        raise ValueError(f"{path}: column {image!r}: expected a datasets.Image, got {table.features[image]}")
    labels = np.asarray(table.with_format("numpy")[label][:]) if label else None
    if labels is not None and (labels.dtype.kind not in "iu" or labels.ndim != 1):
        raise ValueError(f"{path}: column {label!r}: expected whole numbers, none missing, got {table.features[label]}")
    undecoded = table.cast_column(image, datasets.Image(decode=False))[image]
    return Listing(undecoded, labels, table[caption] if caption else None, version=version)
