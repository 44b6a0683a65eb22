"""Which samples a path holds: images not yet decoded, their labels and captions.

===================================  ===============================================================================
path                                 samples
===================================  ===============================================================================
``.npz``                             ``images`` uint8 (N, H, W) or (N, H, W, C), and if present ``labels`` int (N,),
                                     ``captions`` str (N,)
Hugging Face dataset                 its ``image`` column, and if present ``label``, ``text``; see
                                     :mod:`stepdistill.data.hf_datasets`
folder with ``metadata.jsonl``       a JSON object a line: ``file_name``, and in every line or none ``label``, ``text``
``.tar``, or a folder of them         WebDataset samples, see :mod:`stepdistill.data.webdataset`
folder of folders                    a class per sub-folder, numbered in the order of the names as text ("10" < "9")
folder                               images without labels; captions, if a ``.txt`` lies beside every image
===================================  ===============================================================================

A folder of parquet files is a Hugging Face dataset if they are named as on the hub (``train-00000-of-00002.parquet``),
or no images lie beside them; a ``metadata.jsonl`` or a tar in it goes before both. Nothing is unpickled. Hidden folders
and files that are not images are passed over.
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

from stepdistill.config import nearest
from stepdistill.data.base import TABLE_KEYS, DataConfig
from stepdistill.data.hf_datasets import is_hub_id, is_saved, open_table, refuse_keys
from stepdistill.data.text import json_lines, read_prompts, read_text, row_value
from stepdistill.data.webdataset import TarMember, read_tars

T = TypeVar("T")


STRAY = -1  # label of an image that lies beside the class folders


IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The samples of a path: ``images`` in a form that :func:`~stepdistill.data.decoding.read_pixels` takes."""

    images: Sequence[Any] | np.ndarray
    labels: np.ndarray | None = None
    captions: Sequence[str | None] | np.ndarray | None = None
    num_folders: int | None = None  # classes, where labels only number the sub-folders
    version: str | None = None  # which content the path had, where the path alone does not say


def sample_name(images: Any, row: int, path: str | Path | None) -> str:
    """What a person calls an image: its file, or its row in ``path``."""
    return str(images[row]) if isinstance(images[row], (str, TarMember)) else f"{path}[{row}]"


def list_samples(config: DataConfig) -> Listing:
    """The samples at ``config.path``, whichever of the forms above it has.

    Raises:
        ValueError: if it has none of them, or breaks its rules; it names the file.
    """
    path = Path(str(config.path))
    if is_saved(path) or is_hub_id(path) or _holds_parquet(path):
        return _table(path, config)
    refuse_keys(config, TABLE_KEYS, f"{path} is no Hugging Face dataset")
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
        return "expected a folder, an .npz or a .tar, found another file"
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"no such file or folder{nearest(path.name, difflib.get_close_matches(path.name, names, n=1))}"


# ------------------------------------------------------------------------------------------------- .npz


def _npz(path: Path) -> Listing:
    arrays = _arrays(path)
    images, labels, captions = arrays["images"], arrays.get("labels"), arrays.get("captions")
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"{path}: 'images' is {images.dtype} {images.shape}, expected uint8 (N, H, W) or (N, H, W, C) in [0, 255]"
        )
    for name, column, kind in (("labels", labels, "iu"), ("captions", captions, "U")):
        if column is not None and (column.dtype.kind not in kind or column.shape != images.shape[:1]):
            wanted = "int" if name == "labels" else "str"
            raise ValueError(f"{path}: {name!r} is {column.dtype} {column.shape}, expected {wanted} ({len(images)},)")
    return Listing(images if images.ndim == 4 else images[..., None], labels, captions)


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
    inside = [file[len(str(folder)) + 1 :] for file in files]
    tops = [name.split(os.sep)[0] if os.sep in name else None for name in inside]
    classes = sorted({top for top in tops if top is not None})
    captions = _caption_files(files)
    if not classes:
        return Listing(files, captions=captions)
    number: dict[str | None, int] = {None: STRAY} | {name: label for label, name in enumerate(classes)}
    return Listing(files, np.array([number[top] for top in tops]), captions, num_folders=len(classes))


def _caption_files(images: Sequence[str]) -> list[str | None] | None:
    """The text beside every image (``a.txt`` beside ``a.png``), None where there is none."""
    texts = [Path(image).with_suffix(".txt") for image in images]
    captions = [" ".join(read_text(text).split()) if text.is_file() else None for text in texts]
    return captions if any(caption is not None for caption in captions) else None


def list_prompts(config: DataConfig) -> list[str]:
    """The prompts in ``config.path``: a ``.jsonl`` of objects, or any other text file, one a line.

    Raises:
        ValueError: if there is no such file, and as :func:`~stepdistill.data.text.read_prompts`.
    """
    path = Path(str(config.path))
    if not path.is_file():
        raise ValueError(f"data.path: {path}: {_why_not(path) if not path.is_dir() else 'is a folder, wanted a file'}")
    return read_prompts(path, config.caption_column or "text")


def _image_files(folder: Path) -> Iterator[str]:
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(root, name) for name in names if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _metadata(file: Path, config: DataConfig) -> Listing:
    rows = json_lines(file)
    known = sorted({key for row in rows.values() for key in row})
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
    """The name asked for, which must exist; else the usual one if it does."""
    known = list(known)
    if asked and asked not in known:
        raise ValueError(f"{where}: no column {asked!r}{nearest(asked, known)}")
    return asked or (usual if usual in known else None)


def _tars(tars: Sequence[Path], config: DataConfig) -> Listing:
    found = read_tars(tars, IMAGE_SUFFIXES, config.caption_column, config.label_column)
    unlabelled = [str(image) for image, label in zip(found.images, found.labels, strict=True) if label is None]
    if unlabelled and len(unlabelled) < len(found.images):
        raise ValueError(f"{unlabelled[0]}: no label, but others have one ({len(unlabelled)} without)")
    captioned = any(caption is not None for caption in found.captions)
    return Listing(
        found.images, None if unlabelled else np.array(found.labels, dtype=int), found.captions if captioned else None
    )


# ----------------------------------------------------------------------------------- Hugging Face datasets


def _holds_parquet(path: Path) -> bool:
    if not path.is_dir() or (path / "metadata.jsonl").is_file() or any(path.glob("*.tar")):
        return False
    names = [file.name for file in path.rglob("*.parquet")]
    return any("-of-" in name for name in names) or (bool(names) and not any(_image_files(path)))


def _table(path: Path, config: DataConfig) -> Listing:
    import datasets

    table, version = open_table(path, config)
    image = _column(config.image_column, "image", table.column_names, str(path))
    label = _column(config.label_column, "label", table.column_names, str(path))
    caption = _column(config.caption_column, "text", table.column_names, str(path))
    if not isinstance(table.features[image], datasets.Image):
        raise ValueError(f"{path}: column {image!r} is {table.features[image]}, expected a datasets.Image")
    labels = np.asarray(table.with_format("numpy")[label][:]) if label else None
    if labels is not None and (labels.dtype.kind not in "iu" or labels.ndim != 1):
        raise ValueError(f"{path}: column {label!r} is {table.features[label]}, expected whole numbers, none missing")
    undecoded = table.cast_column(image, datasets.Image(decode=False))[image]
    return Listing(undecoded, labels, table[caption] if caption else None, version=version)
