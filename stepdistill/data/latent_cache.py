"""Latents and prompt embeddings of a data set, computed once by a latent teacher's frozen encoders.

A cache is ``cache.json`` (which encoders, which data, how many rows), ``captions.jsonl`` and shards
(:mod:`stepdistill.data.shards`): ``images`` and, if training mirrors, ``mirrored``, latents as the network sees them;
``cond.<name>``, the conditions. The last row belongs to the empty caption, which replaces a dropped one. Where samples
have several captions, :mod:`stepdistill.data.cached_texts` holds the others.

Training from a cache (``data: {name: cache, path: ...}``) sees the same bits as training from the files, if both encode
the same number of samples at a time (``data.batch_size``): that number decides which convolution kernels run, and with
them the last bits. Make a cache therefore with the ``data`` section of the training that will use it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.batch import Batch, RawBatch
from stepdistill.config import changed_keys, fingerprint_json
from stepdistill.data.base import DataConfig, Dataset
from stepdistill.data.buckets import sort_into
from stepdistill.data.cached_sizes import CachedSizes, by_size
from stepdistill.data.cached_texts import (
    CachedTexts,
    batches,
    read_captions,
    stored_texts,
    write_captions,
    write_texts,
)
from stepdistill.data.columns import Texts, first_texts, several
from stepdistill.data.inventory import archives
from stepdistill.data.remote import is_address
from stepdistill.data.shard_writing import write_or_check_manifest, write_shards
from stepdistill.data.shards import ShardFormat, Shards, concatenate
from stepdistill.diffusion.schedule import expand
from stepdistill.families.base import Family
from stepdistill.families.vaes import latent_statistics
from stepdistill.files.places import Place
from stepdistill.files.ranges import PositiveInt
from stepdistill.networks.fingerprint import fingerprint_weights

FORMAT = ShardFormat(key="data.path", rows="samples", manifest="cache.json", script="scripts/cache.py")


def reading(data: DataConfig) -> dict[str, Any]:
    """Return the keys that choose what is read of a sample; caches of older versions do not tell theirs."""
    return {"fps": data.fps, "image_column": data.image_column}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The ``cache`` section."""

    output_dir: Place
    shard_size: PositiveInt = 1024
    """Samples per file, which is the most that a stopped run loses."""


def encoders(family: Family) -> dict[str, str]:
    """Return a hash of every frozen part of a latent teacher's pipeline: what a cache depends on besides the data.

    Raises:
        ValueError: for a teacher of pixels, which encodes nothing.
    """
    if not family.caches_latents:
        raise ValueError("cache: the teacher works on pixels and has no encoder; there is nothing to cache")
    hashes: dict[str, str] = {}
    if (vae := family.pipe.components.get("vae")) is not None:  # observed pipelines of pixels have none
        shift, scale = latent_statistics(vae, torch.zeros(1))
        hashes["latent scale"] = fingerprint_json([shift.flatten().tolist(), scale.flatten().tolist()])
    for name, part in sorted(family.pipe.components.items()):
        if any(part is encoder for encoder in family.frozen_modules):
            hashes[name] = fingerprint_json([fingerprint_weights(part), str(next(part.parameters()).dtype)])
        elif hasattr(part, "get_vocab"):
            hashes[name] = fingerprint_json([sorted(part.get_vocab().items()), part.model_max_length])
    return hashes


def files(dataset: Dataset, root: str) -> str:
    """Return a hash of the samples: names below ``root``, file sizes, captions, labels; of archives and the version.

    The version of files at an address has their names; where copies of them lie, and a signature, do not matter.
    """
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        name = dataset.name(index)
        size = os.path.getsize(name) if os.path.isfile(name) else 0
        place = index if is_address(root) else os.path.relpath(name, root)
        caption = stored_texts(dataset, index)
        label = None if dataset.labels is None else dataset.labels[index]
        digest.update(json.dumps([place, size, caption, label]).encode())
    digest.update(str(list(archives(Path(root)))).encode())
    digest.update((dataset.version or "").encode())
    return digest.hexdigest()[:16]


def make_cache(
    family: Family, dataset: Dataset, data: DataConfig, config: CacheConfig,
    progress: Callable[[int], object] = lambda done: None,
) -> Path:  # fmt: skip
    """Write what is missing of a cache, and return its folder.

    Args:
        family: the opened teacher, on the device that encodes.
        dataset: the data, which is encoded once and completely.
        data: the section it was opened from.
        config: the ``cache`` section.
        progress: called after every shard with the number of rows so far.

    Raises:
        ValueError: if the folder holds a cache of other encoders or other data, or a sample cannot be read.
    """
    folder, count = Path(config.output_dir), len(dataset)
    manifest = {
        "count": count + 1, "shard_size": config.shard_size, "batch_size": data.batch_size,
        "encoders": encoders(family), "sample_shape": list(family.sample_shape), "dtype": "float32",
        "files": files(dataset, str(data.path)), "fit": data.fit, "mirrored": data.flip,
    }  # fmt: skip
    for place, bucket in enumerate(data.buckets):
        family.check_size((bucket[0], bucket[1]), f"data.buckets[{place}]")
    if data.buckets:
        manifest["buckets"] = [list(bucket) for bucket in data.buckets]
    manifest |= {key: value for key, value in reading(data).items() if value not in (None, DataConfig.image_column)}
    write_or_check_manifest(folder / FORMAT.manifest, manifest, FORMAT.rows)
    write_captions(folder / FORMAT.manifest, dataset)
    if family.takes_text and dataset.choices is not None:
        write_texts(
            folder, family, dataset.choices, encoders=manifest["encoders"], batch_size=data.batch_size,
            shard_size=config.shard_size,
        )  # fmt: skip

    make = functools.partial(_encode_rows, family, dataset, data)
    write_shards(folder / FORMAT.manifest, FORMAT.rows, make, progress)
    return folder


def _encode_rows(family: Family, dataset: Dataset, data: DataConfig, rows: range) -> dict[str, Tensor]:
    """Return the tensors of the samples at ``rows``, of which those of one size are encoded together."""
    parts, order = [], []
    for group in by_size(rows, functools.partial(_size_of, dataset)):
        found = [_encode(family, dataset, batch, data) for batch in batches(group, data.batch_size)]
        parts.append({name: tensor[: len(group)] for name, tensor in concatenate(found).items()})
        order += group
    places = torch.tensor(order).argsort()
    return {name: tensor[places] for name, tensor in concatenate(parts).items()}


def _size_of(dataset: Dataset, row: int) -> tuple[int, ...]:
    """Return the size of a row's image; the row after the last sample has that one's."""
    return () if dataset.buckets is None else dataset.buckets.size_of[min(row, len(dataset) - 1)]


@torch.no_grad()
def _encode(family: Family, dataset: Dataset, rows: Sequence[int], data: DataConfig) -> dict[str, Tensor]:
    """Return the tensors of the samples at ``rows``; the row after the last sample is the empty caption's."""
    raw = _load_with_empty_caption(dataset, rows)
    batch, sizes = family.encode(raw), CachedSizes.of(family, data.buckets)
    tensors = {f"cond.{name}": value.cpu() for name, value in batch.cond.items()}
    if batch.images is not None:
        tensors["images"] = sizes.stored(batch.images.cpu())
    if data.flip and raw.images is not None:
        mirrored = family.encode(dataclasses.replace(raw, images=raw.images.flip(-1)))
        tensors["mirrored"] = sizes.stored(mirrored.x0.cpu())
    return tensors


def _load_with_empty_caption(dataset: Dataset, rows: Sequence[int]) -> RawBatch:
    empty = len(dataset)
    raw = dataset.load([min(row, empty - 1) for row in rows])
    if raw.unreadable:
        raise ValueError(f"cache: unreadable image {raw.unreadable[0]}; a cache skips nothing, so remove the file")
    if raw.captions is None or empty not in rows:
        return raw
    captions = list(raw.captions)
    for place, row in enumerate(rows):
        if row == empty:
            captions[place] = ""
    return dataclasses.replace(raw, captions=tuple(captions))


class LatentCacheDataset(Dataset):
    """A cache in place of the data it was made from.

    Args:
        config: the ``data`` section.
        family: the opened teacher.
        needs_images: whether the training needs more than prompts.

    Raises:
        ValueError: if it is incomplete, was made by other encoders, or lacks what the training needs.
    """

    num_classes = None
    is_encoded = True

    def __init__(self, config: DataConfig, family: Family, *, needs_images: bool = True) -> None:
        self.shards = Shards(str(config.path), FORMAT)
        self._sizes = CachedSizes.of(family, config.buckets)
        self._check_made_for(config, family)
        self._check_content(config, needs_images)
        self._names, texts, sizes = read_captions(self.shards, len(self))
        if config.buckets:
            self.buckets = sort_into(self._sizes.sizes, [(height, width) for height, width in sizes])
        if family.takes_text:
            self._use_texts(texts)
        self.size, self.flip, self.caption_dropout = family.image_shape, config.flip, config.caption_dropout
        self.version = self.shards.version

    def _use_texts(self, texts: list[Texts]) -> None:
        self.captions, self.choices = first_texts(texts), several(texts)
        if self.captions is None:
            raise ValueError(f"{self.shards.folder}: the teacher takes text, but a sample has no caption in it")
        if self.choices is not None:
            self._others = CachedTexts(self.shards.folder, self.choices)

    def _check_made_for(self, config: DataConfig, family: Family) -> None:
        made, current = self.shards.entry("encoders", dict[str, str]), encoders(family)
        if changed := changed_keys(made, current):
            raise ValueError(
                f"data.path: {config.path} was made by another {', '.join(changed)} than this teacher's; make another "
                f"cache with {FORMAT.script}"
            )
        expected = list(family.sample_shape)
        if (shape := self.shards.entry("sample_shape", list[int])) != expected:
            raise ValueError(f"data.path: {config.path}: expected samples {expected}, got {shape}")
        if (made_with := self.shards.manifest.get("buckets", [])) != [list(bucket) for bucket in config.buckets]:
            raise ValueError(f"data.buckets: expected {made_with}, with which {config.path} was made")
        row = self._sizes.row
        for name, (dtype, shape) in self.shards.layout().items():
            if name in ("images", "mirrored") and (dtype, shape) != ("F32", row):
                raise ValueError(f"data.path: {config.path}: {name}: expected F32 {row}, got {dtype} {shape}")

    def _check_content(self, config: DataConfig, needs_images: bool) -> None:
        if config.max_samples is not None and config.max_samples < len(self):
            raise ValueError(
                f"data.max_samples: expected {len(self)}, all samples of {config.path}, got {config.max_samples}; make "
                f"a cache of so many with {FORMAT.script}"
            )
        if needs_images and "images" not in self.shards.names:
            raise ValueError(f"data.path: {config.path} was made of prompts; the method trains on images")
        if needs_images and (fit := self.shards.manifest.get("fit")) != config.fit:
            raise ValueError(f"data.fit: expected {fit!r}, with which {config.path} was made, got {config.fit!r}")
        for key, value in reading(config).items():
            if needs_images and (made := self.shards.manifest.get(key, value)) != value:
                raise ValueError(f"data.{key}: expected {made!r}, with which {config.path} was made, got {value!r}")
        if config.flip and "mirrored" not in self.shards.names:
            raise ValueError(f"data.flip: {config.path} holds no mirrored images; make it again with data.flip=true")

    def __len__(self) -> int:
        return len(self.shards) - 1

    def name(self, index: int) -> str:
        """Return the name of the sample that was encoded."""
        return self._names[index]

    def load(self, indices: Sequence[int]) -> RawBatch:
        """Return captions only; :meth:`read_encoded` reads the rest."""
        captions = None if self.captions is None else tuple(self.captions[index] for index in indices)
        return RawBatch(None, None, captions, tuple(indices))

    def read_encoded(self, raw: RawBatch) -> Batch:
        """Return what the family would have made of the batch; a dropped caption has the empty one's row."""
        rows = list(raw.indices)
        for place, caption in enumerate(raw.captions or ()):
            if not caption:
                rows[place] = len(self)
        cond = {name: self.shards.rows(f"cond.{name}", rows) for name in self.shards.cond_names}
        if self.choices is not None and raw.captions is not None:
            cond = self._others.replace(cond, raw.indices, raw.captions)
        images = self._latents("images", raw) if "images" in self.shards.names else None
        if images is not None and raw.mirrored is not None:
            mirrored = expand(raw.mirrored, images) > 0
            images = torch.where(mirrored, self._latents("mirrored", raw), images)
        return Batch(images, cond, len(raw.indices))

    def _latents(self, name: str, raw: RawBatch) -> Tensor:
        rows = self.shards.rows(name, raw.indices)
        return self._sizes.restored(rows, _size_of(self, raw.indices[0]))
