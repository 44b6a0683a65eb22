"""WebDataset tars: samples that lie as files of one name side by side in a tar, read where they lie.

``000017.jpg``, ``000017.txt`` and ``000017.cls`` are one sample's image, caption and label; a ``000017.json`` may hold
caption and label instead. A tar's headers are read once, from front to back; an image is then read by its place in the
tar, so that samples come in any order and nothing is ever unpacked.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.config import nearest
from stepdistill.data.text import decode_text

CAPTION_KEYS = ("caption", "text")
"""Where a ``.json`` has its caption, if ``caption_column`` does not say."""


@dataclasses.dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar: its first byte and its length there."""

    tar: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}!{self.name}"

    def read(self) -> bytes:
        """Its content; raises ``OSError`` if the tar ends before it does."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise OSError(f"{self}: the tar is cut short")
        return content


@dataclasses.dataclass(frozen=True)
class TarSamples:
    """What tars hold, in their order: one entry a sample in every list."""

    images: list[TarMember]
    captions: list[str | None]
    labels: list[int | None]


def read_tars(
    tars: Sequence[Path], suffixes: Sequence[str], caption_key: str | None = None, label_key: str | None = None
) -> TarSamples:
    """The samples of uncompressed tars.

    Args:
        tars: files, in order.
        suffixes: of images, with their dots.
        caption_key: of the caption in a ``.json``; by default ``caption`` or ``text``.
        label_key: of the label there; by default ``label``.

    Raises:
        ValueError: for a file that is no tar, or a compressed one, and for damaged captions and labels; it names them.
    """
    images, captions, labels = [], [], []
    for tar in tars:
        for parts in _grouped(tar):
            image = next((member for suffix, member in parts.items() if suffix in suffixes), None)
            if image is not None:
                images.append(image)
                captions.append(_caption(parts, caption_key))
                labels.append(_label(parts, label_key or "label"))
    return TarSamples(images, captions, labels)


def _grouped(tar: Path) -> Iterator[dict[str, TarMember]]:
    """The files of every sample by suffix. A sample's files follow each other; its key ends at the name's first dot."""
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


def _caption(parts: Mapping[str, TarMember], key: str | None) -> str | None:
    if ".txt" in parts and key is None:
        return " ".join(decode_text(parts[".txt"].read(), str(parts[".txt"])).split())
    row = _json(parts)
    names = CAPTION_KEYS if key is None else (key,)
    found = next((row[name] for name in names if name in row), None)
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{parts['.json']}: the caption is {found!r}, expected text")
    if found is None and key is not None and row:
        raise ValueError(f"{parts['.json']}: no key {key!r}{nearest(key, row)}")
    return found


def _label(parts: Mapping[str, TarMember], key: str) -> int | None:
    if ".cls" in parts:
        text = decode_text(parts[".cls"].read(), str(parts[".cls"])).strip()
        if not text.isdecimal():
            raise ValueError(f"{parts['.cls']}: the label is {text!r}, expected a whole number")
        return int(text)
    found = _json(parts).get(key)
    if found is not None and type(found) is not int:
        raise ValueError(f"{parts['.json']}: {key!r} is {found!r}, expected a whole number")
    return found


def _json(parts: Mapping[str, TarMember]) -> dict[str, Any]:
    if ".json" not in parts:
        return {}
    member = parts[".json"]
    try:
        row = json.loads(decode_text(member.read(), str(member)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{member}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{member}: expected a JSON object")
    return row
