"""WebDataset tars: the files of a sample have one name and lie side by side in a tar, which is never unpacked.

``000017.jpg``, ``000017.txt`` and ``000017.cls`` are one sample's image, caption and label; a ``000017.json`` may hold
caption and label instead. The headers of a tar are read once, from front to back; an image is then read at its offset
in the tar, so samples can be read in any order.
"""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.data.columns import Column, Texts, read_label, read_texts
from stepdistill.data.text import decode_text
from stepdistill.files.reading import parse_json
from stepdistill.files.schema import nearest

CAPTION_KEYS = ("caption", "text")
"""Keys of a caption in a ``.json``, unless ``caption_column`` is given."""


@dataclasses.dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar: its offset and its length in bytes."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}!{self.name}"

    def read(self) -> bytes:
        """Return the content; raise ``OSError`` if the tar ends too early."""
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
        ValueError: for a file that is not an uncompressed tar.
    """
    images, captions, labels = [], Column[Texts](), Column[int | None]()
    for tar in tars:
        for parts in _grouped(tar):
            image = next((member for suffix, member in parts.items() if suffix in suffixes), None)
            if image is not None:
                images.append(image)
                captions.add(_caption, parts, caption_key)
                labels.add(_label, parts, label_key or "label")
    return TarSamples(images, captions, labels)


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
    try:
        with tarfile.open(tar, "r:") as archive:
            for entry in archive:
                if entry.isreg() and not entry.sparse:
                    yield TarMember(str(tar), entry.name, entry.offset_data, entry.size)
    except tarfile.TarError as error:
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
