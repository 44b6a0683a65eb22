"""WebDataset tars: the files of a sample have one name and lie side by side in a tar, which is never unpacked.

``000017.jpg``, ``000017.txt`` and ``000017.cls`` are one sample's image, caption and label; a ``000017.json`` may hold
caption and label instead. Tars may lie on this machine or at an address, see :mod:`stepdistill.data.tars`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from stepdistill.data.columns import Column, Texts, read_label, read_texts
from stepdistill.data.image_files import count_words, left_out_suffix
from stepdistill.data.tars import TarMember, members_of
from stepdistill.data.text import decode_text
from stepdistill.files.reading import parse_json
from stepdistill.files.words import nearest

CAPTION_KEYS = ("caption", "text")
"""Keys of a caption in a ``.json``, unless ``caption_column`` is given."""


@dataclasses.dataclass(frozen=True)
class TarSamples:
    """The samples of tars, in their order: one entry per sample in every list."""

    images: list[TarMember]
    captions: Column[Texts]
    labels: Column[int | None]
    left_out: str
    """How many other files of which endings have no image beside them."""


def read_tars(
    tars: Sequence[str], suffixes: Sequence[str], caption_key: str | None = None, label_key: str | None = None
) -> TarSamples:
    """Return the samples of uncompressed tars.

    Args:
        tars: files or addresses, in order.
        suffixes: suffixes of images, with their dots.
        caption_key: key of the caption in a ``.json``; by default ``caption`` or ``text``.
        label_key: key of the label there; by default that of a ``.cls``, or ``label``.

    Raises:
        ValueError: for a file that is not an uncompressed tar, and for names that lead out of it.
    """
    images, captions, labels = [], Column[Texts](), Column[int | None]()
    left_out: collections.Counter[str] = collections.Counter()
    for members in members_of(tars):
        for parts in _grouped(members):
            image = next((member for suffix, member in parts.items() if suffix in suffixes), None)
            if image is not None:
                images.append(image)
                captions.add(_caption, parts, caption_key)
                labels.add(_label, parts, label_key)
            else:
                left_out.update(filter(None, (_left_out(suffix, suffixes) for suffix in parts)))
    return TarSamples(images, captions, labels, count_words(left_out))


def _left_out(suffix: str, suffixes: Sequence[str]) -> str:
    """Return the ending of a file that is no image; of ``a.v2.png``, whose sample is ``a``, all after the first dot."""
    return suffix if suffix.endswith(tuple(suffixes)) else left_out_suffix(f"_{suffix}")


def _grouped(members: Iterable[TarMember]) -> Iterator[dict[str, TarMember]]:
    """Yield the files of every sample by suffix.

    The files of a sample are adjacent; they share the name up to its first dot.
    """
    last: tuple[str, str] | None = None
    parts: dict[str, TarMember] = {}
    for member in members:
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


def _label(parts: Mapping[str, TarMember], asked: str | None) -> int | None:
    if ".cls" in parts and asked is None:
        text = decode_text(parts[".cls"].read(), str(parts[".cls"]))
        return read_label(text.strip(), f"{parts['.cls']}: label")
    row, key = _json(parts), asked or "label"
    if asked is not None and row and asked not in row:
        raise ValueError(f"{parts['.json']}: no key {asked!r}{nearest(asked, row)}")
    return None if row.get(key) is None else read_label(row[key], f"{parts['.json']}: {key!r}")


def _json(parts: Mapping[str, TarMember]) -> dict[str, Any]:
    if ".json" not in parts:
        return {}
    member = parts[".json"]
    return parse_json(decode_text(member.read(), str(member)), str(member))
