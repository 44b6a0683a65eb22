"""WebDataset tars: the files of a sample have one name and lie side by side in a tar, which is never unpacked.

``000017.jpg``, ``000017.txt`` and ``000017.cls`` are one sample's image, caption and label; a ``000017.json`` may hold
caption and label instead. The headers of a tar are read once, from front to back; an image is then read at its offset
in the tar, so samples can be read in any order.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import struct
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.data.columns import Column, Texts, read_label, read_texts
from stepdistill.data.image_files import count_words, left_out_suffix
from stepdistill.data.text import decode_text
from stepdistill.files.reading import check_file, parse_json
from stepdistill.files.words import nearest

CAPTION_KEYS = ("caption", "text")
"""Keys of a caption in a ``.json``, unless ``caption_column`` is given."""

MAX_TEXT_BYTES = 2**20
"""Size of the largest caption or label."""
MAX_HEADER_BYTES = 2**20
"""Most that the header of one member, with its long name and extensions, may take."""
MAX_TAR_BYTES = 2**50

_TAR_ERRORS = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    struct.error,
)
"""What tarfile raises for damaged archives (``RecursionError`` is a ``RuntimeError``)."""


@dataclasses.dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar: its offset and its length in bytes."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}!{self.name}"

    def read(self, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
        """Return the content; raise ``OSError`` if the tar ends too early, ``ValueError`` if there is too much."""
        if self.size > max_bytes:
            raise ValueError(f"{self}: expected at most {max_bytes:,} bytes, got {self.size:,}")
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise OSError(f"{self}: the tar is cut short")
        return content


@dataclasses.dataclass(frozen=True)
class TarSamples:
    """The samples of tars, in their order: one entry per sample in every list."""

    images: list[TarMember]
    captions: Column[Texts]
    labels: Column[int | None]
    left_out: str
    """How many other files of which endings have no image beside them."""


def read_tars(
    tars: Sequence[Path], suffixes: Sequence[str], caption_key: str | None = None, label_key: str | None = None
) -> TarSamples:
    """Return the samples of uncompressed tars.

    Args:
        tars: files, in order.
        suffixes: suffixes of images, with their dots.
        caption_key: key of the caption in a ``.json``; by default ``caption`` or ``text``.
        label_key: key of the label there; by default ``label``.

    Raises:
        ValueError: for a file that is not an uncompressed tar, and for names that lead out of it.
    """
    images, captions, labels = [], Column[Texts](), Column[int | None]()
    left_out: collections.Counter[str] = collections.Counter()
    for tar in tars:
        for parts in _grouped(tar):
            image = next((member for suffix, member in parts.items() if suffix in suffixes), None)
            if image is not None:
                images.append(image)
                captions.add(_caption, parts, caption_key)
                labels.add(_label, parts, label_key or "label")
            else:
                left_out.update(filter(None, (left_out_suffix(f"_{suffix}") for suffix in parts)))
    return TarSamples(images, captions, labels, count_words(left_out))


def _grouped(tar: Path) -> Iterator[dict[str, TarMember]]:
    """Yield the files of every sample by suffix.

    The files of a sample are adjacent; they share the name up to its first dot.
    """
    last: tuple[str, str] | None = None
    parts: dict[str, TarMember] = {}
    for member in _members(tar):
        folder, _, name = member.name.rpartition("/")
        stem, dot, suffix = name.partition(".")
        if not dot or name.startswith("."):
            continue
        if (folder, stem) != last and parts:
            yield parts
            parts = {}
        last = (folder, stem)
        parts[f".{suffix.lower()}"] = member
    if parts:
        yield parts


def _members(tar: Path) -> Iterator[TarMember]:
    """Yield the files in a tar; warn once of links, devices and sparse files, whose content is not there."""
    others, last = [], -1
    for entry in _entries(tar):
        name = f"{tar}!{entry.name}"
        if entry.name.startswith("/") or ".." in entry.name.split("/"):
            raise ValueError(f"{name}: expected a name inside the tar, got one that leads outside")
        if entry.size < 0 or entry.offset <= last:  # a negative size leads back to an earlier header, for ever
            raise ValueError(f"{name}: expected a size of at least 0, got a negative one")
        last = entry.offset
        if entry.isreg() and not entry.sparse:
            yield TarMember(str(tar), entry.name, entry.offset_data, entry.size)
        elif not entry.isdir():
            others.append(name)
    if others:
        warnings.warn(
            f"{tar}: left out {len(others)} links, devices or sparse files; the first is {others[0]}", stacklevel=2
        )


class _Headers(io.FileIO):
    """A tar of which only headers are read, so that one that declares gigabytes takes none."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise OSError(f"a header of {size} bytes")
        return super().read(size)


def _entries(tar: Path) -> Iterator[tarfile.TarInfo]:
    check_file(tar, MAX_TAR_BYTES)
    try:
        with _Headers(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            yield from archive
    except _TAR_ERRORS as error:
        raise ValueError(f"{tar}: cannot be read as an uncompressed tar ({error}); unpack .tar.gz first") from error


def _caption(parts: Mapping[str, TarMember], key: str | None) -> Texts:
    if ".txt" in parts and key is None:
        return (" ".join(decode_text(parts[".txt"].read(), str(parts[".txt"])).split()),)
    row = _json(parts)
    for name in CAPTION_KEYS if key is None else (key,):
        if row.get(name) is not None:
            return read_texts(row[name], f"{parts['.json']}: {name!r}")
    if key is not None and row and key not in row:
        raise ValueError(f"{parts['.json']}: no key {key!r}{nearest(key, row)}")
    return ()


def _label(parts: Mapping[str, TarMember], key: str) -> int | None:
    if ".cls" in parts:
        text = decode_text(parts[".cls"].read(), str(parts[".cls"]))
        return read_label(text.strip(), f"{parts['.cls']}: label")
    row = _json(parts)
    return None if row.get(key) is None else read_label(row[key], f"{parts['.json']}: {key!r}")


def _json(parts: Mapping[str, TarMember]) -> dict[str, Any]:
    if ".json" not in parts:
        return {}
    member = parts[".json"]
    return parse_json(decode_text(member.read(), str(member)), str(member))
