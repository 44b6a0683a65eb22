"""The captions of a cache: ``captions.jsonl``, and the conditions of those beyond a sample's first.

A cache's own shards hold one row of conditions a sample, its first caption's. Where samples have several, the folder
``texts`` of the cache holds the others in the same form, one row each: those of sample 0, those of sample 1, and so on.
Any caption that a visit draws is therefore there, and training from the cache draws as training from the files does.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.batch import Cond, RawBatch
from stepdistill.config import fingerprint_json
from stepdistill.data.base import Dataset
from stepdistill.data.columns import Texts, other_texts, read_texts
from stepdistill.data.shard_writing import write_once, write_or_check_manifest, write_shards
from stepdistill.data.shards import (
    ShardFormat,
    Shards,
    concatenate,
)
from stepdistill.data.text import json_lines
from stepdistill.families.base import Family

CAPTIONS = "captions.jsonl"
FOLDER = "texts"
FORMAT = ShardFormat(key="data.path", rows="captions", manifest="texts.json", script="scripts/cache.py")


@dataclasses.dataclass(frozen=True)
class _Line:
    """A sample in the file of captions."""

    name: str
    text: Any
    size: tuple[int, ...] = ()
    """(height, width) in pixels, if the samples have several."""


def stored_texts(dataset: Dataset, index: int) -> str | list[str] | None:
    """Return the captions of a sample as a cache notes them: text if there is one, else a list."""
    if dataset.choices is not None and len(dataset.choices[index]) > 1:
        return list(dataset.choices[index])
    return None if dataset.captions is None else dataset.captions[index]


def write_captions(manifest: Path, dataset: Dataset) -> None:
    """Write names and captions of all samples beside the manifest of a cache."""

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for index in range(len(dataset)):
                row: dict[str, Any] = {"name": dataset.name(index), "text": stored_texts(dataset, index)}
                if dataset.buckets is not None:
                    row["size"] = dataset.buckets.size_of[index]
                file.write(json.dumps(row) + "\n")

    write_once(manifest.parent / CAPTIONS, manifest, write)


def read_captions(shards: Shards, count: int) -> tuple[list[str], list[Texts], list[tuple[int, ...]]]:
    """Return names, captions and sizes of all samples of a cache.

    Raises:
        ValueError: naming the file and line, if it is damaged or does not have ``count`` lines.
    """
    file = shards.folder / CAPTIONS
    shards.verify(file)
    names, captions, sizes = [], [], []
    for where, row in json_lines(file, _Line).items():
        names.append(row.name)
        captions.append(read_texts(row.text, f"{where}: 'text'"))
        sizes.append(row.size)
    if len(names) != count:
        raise ValueError(f"{file}: expected {count} lines, one a sample, got {len(names)}; make the cache again")
    return names, captions, sizes


@torch.no_grad()
def write_texts(
    folder: Path,
    family: Family,
    choices: Sequence[Texts],
    *,
    encoders: Any,
    batch_size: int,
    shard_size: int,
) -> None:
    """Write the conditions of every caption beyond a sample's first, so far as they are missing.

    Args:
        folder: of the cache.
        family: the opened teacher.
        choices: captions of every sample.
        encoders: what a cache depends on besides the data.
        batch_size: captions that are encoded at a time.
        shard_size: captions per file.

    Raises:
        ValueError: if the folder holds those of other captions or encoders.
    """
    texts = other_texts(choices)
    manifest = {
        "count": len(texts), "shard_size": shard_size, "batch_size": batch_size, "encoders": encoders,
        "captions": fingerprint_json([list(found) for found in choices]),
    }  # fmt: skip
    write_or_check_manifest(folder / FOLDER / FORMAT.manifest, manifest, FORMAT.rows)

    def make(rows: range) -> dict[str, Tensor]:
        parts = [_encode(family, [texts[row] for row in batch]) for batch in batches(rows, batch_size)]
        return {name: tensor[: len(rows)] for name, tensor in concatenate(parts).items()}

    write_shards(folder / FOLDER / FORMAT.manifest, FORMAT.rows, make)


def _encode(family: Family, texts: Sequence[str]) -> dict[str, Tensor]:
    cond = family.encode(RawBatch(None, None, tuple(texts), tuple(range(len(texts))))).cond
    return {f"cond.{name}": value.cpu() for name, value in cond.items()}


def batches(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield rows in batches of ``size``, the last one filled up, so that the same kernels encode all of them."""
    for start in range(0, len(rows), size):
        batch = list(rows[start : start + size])
        yield batch + batch[-1:] * (size - len(batch))


class CachedTexts:
    """Conditions of the captions beyond the first.

    Args:
        folder: of the cache.
        choices: captions of every sample.

    Raises:
        ValueError: if some are missing.
    """

    def __init__(self, folder: Path, choices: Sequence[Texts]) -> None:
        self.shards, self._choices = Shards(folder / FOLDER, FORMAT), choices
        others = itertools.accumulate((max(len(found) - 1, 0) for found in choices), initial=0)
        self._first = list(others)
        """Row of each sample's second caption, and the number of rows."""
        if len(self.shards) != self._first[-1]:
            raise ValueError(
                f"{folder / FOLDER}: expected {self._first[-1]} captions, as {folder / CAPTIONS} has, got "
                f"{len(self.shards)}; make the cache again"
            )

    def replace(self, cond: Cond, indices: Sequence[int], captions: Sequence[str]) -> Cond:
        """Return conditions (B, ...) of first captions, replaced where another caption was drawn."""
        places, rows = [], []
        for place, (index, caption) in enumerate(zip(indices, captions, strict=True)):
            if caption and (number := self._choices[index].index(caption)):
                places.append(place)
                rows.append(self._first[index] + number - 1)
        if not places:
            return cond
        replaced: Cond = {}
        for name, values in cond.items():
            others = self.shards.rows(f"cond.{name}", rows)
            replaced[name] = values.to(torch.promote_types(values.dtype, others.dtype), copy=True)
            replaced[name][places] = others.to(replaced[name].dtype)
        return replaced
