"""Latents and prompt embeddings, computed once: what a latent teacher's frozen encoders make of a data set.

A cache is ``cache.json`` (which encoders, which data, how many rows), ``captions.jsonl`` and shards
(:mod:`stepdistill.data.shards`): ``images`` and, where training mirrors, ``mirrored``, latents as the network sees
them; ``cond.<name>``, what the network is told. The last row is the empty caption's: what a dropped one becomes.

Training from it (``data: {name: cache, path: ...}``) sees the same bits as training from the files, if both encode as
many samples at a time (``data.batch_size``): the kernels of a convolution, and the last bits with them, are chosen by
that number. So a cache is made with the ``data`` section of the training that it serves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stepdistill.batch import Batch, RawBatch
from stepdistill.config import fingerprint
from stepdistill.data.base import DataConfig, Dataset
from stepdistill.data.shards import Kind, Shards, agree, write_shards
from stepdistill.families.base import Family
from stepdistill.families.latent import LatentFamily, latent_statistics
from stepdistill.networks.fingerprint import fingerprint_weights

KIND = Kind(key="data.path", rows="samples", manifest="cache.json", script="scripts/cache.py")


CAPTIONS = "captions.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The ``cache`` section."""

    output_dir: str
    shard_size: int = 1024
    """Samples a file: what a stopped run loses at most."""

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size: found {self.shard_size}, wanted at least 1")


def encoders(family: Family) -> dict[str, str]:
    """What a cache depends on beside the data: a hash of every frozen part of a latent teacher's pipeline.

    Raises:
        ValueError: for a teacher of pixels, which encodes nothing.
    """
    if not isinstance(family, LatentFamily):
        raise ValueError("cache: the teacher paints pixels and has no encoder; there is nothing to cache")
    shift, scale = latent_statistics(family.pipe.vae.config, torch.zeros(1))
    found = {"latent scale": fingerprint([shift.flatten().tolist(), scale.flatten().tolist()])}
    for name, part in sorted(family.pipe.components.items()):
        if isinstance(part, nn.Module) and any(part is encoder for encoder in family.frozen_modules):
            found[name] = fingerprint([fingerprint_weights(part), str(next(part.parameters()).dtype)])
        elif hasattr(part, "get_vocab"):
            found[name] = fingerprint([sorted(part.get_vocab().items()), part.model_max_length])
    return found


def files(dataset: Dataset, root: str) -> str:
    """A hash of the samples: names below ``root``, sizes of their files, captions, labels; and of the version."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        name = dataset.name(index)
        size = os.path.getsize(name) if os.path.isfile(name) else 0
        told = [None if column is None else column[index] for column in (dataset.captions, dataset.labels)]
        digest.update(json.dumps([os.path.relpath(name, root), size, *told]).encode())
    holding = [Path(root)] if os.path.isfile(root) else [*Path(root).glob("*.tar"), *Path(root).glob("*.arrow")]
    digest.update(str([file.stat().st_size for file in sorted(holding)]).encode())
    digest.update((dataset.version or "").encode())
    return digest.hexdigest()[:16]


def make_cache(
    family: Family, dataset: Dataset, data: DataConfig, config: CacheConfig,
    progress: Callable[[int], object] = lambda done: None,
) -> Path:  # fmt: skip
    """Write what is not there yet; returns the folder.

    Args:
        family: the opened teacher, on the device that encodes.
        dataset: what is encoded, all of it, once.
        data: the section it was opened from.
        config: the ``cache`` section.
        progress: told how many rows there are, after every shard.

    Raises:
        ValueError: if the folder holds a cache of other encoders or other data, or a sample cannot be read.
    """
    folder, count = Path(config.output_dir), len(dataset)
    manifest = {
        "count": count + 1, "shard_size": config.shard_size, "batch_size": data.batch_size,
        "encoders": encoders(family), "sample_shape": list(family.sample_shape), "dtype": "float32",
        "files": files(dataset, str(data.path)), "fit": data.fit, "mirrored": data.flip,
    }  # fmt: skip
    agree(folder / KIND.manifest, manifest, "samples")
    texts: Sequence[str | None] = dataset.captions or [None] * count
    lines = [json.dumps({"name": dataset.name(index), "text": text}) for index, text in enumerate(texts)]
    (folder / CAPTIONS).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def make(rows: range) -> dict[str, Tensor]:
        encoded = [_encode(family, dataset, batch, data) for batch in _batches(rows, data.batch_size)]
        return {name: torch.cat([part[name] for part in encoded])[: len(rows)] for name in encoded[0]}

    write_shards(folder, count + 1, config.shard_size, make, progress)
    return folder


def _batches(rows: range, size: int) -> Iterator[list[int]]:
    """Rows in batches of ``size``, the last filled up, so that all are encoded by the same kernels."""
    for start in range(0, len(rows), size):
        batch = list(rows[start : start + size])
        yield batch + batch[-1:] * (size - len(batch))


@torch.no_grad()
def _encode(family: Family, dataset: Dataset, rows: Sequence[int], data: DataConfig) -> dict[str, Tensor]:
    """The tensors of the samples at ``rows``; the row behind the last sample is the empty caption's."""
    empty = len(dataset)
    raw = dataset.load([min(row, empty - 1) for row in rows])
    if raw.unreadable:
        raise ValueError(f"cache: unreadable image {raw.unreadable[0]}; a cache leaves out nothing, remove the file")
    if raw.captions is not None:
        captions = tuple("" if row == empty else text for row, text in zip(rows, raw.captions, strict=True))
        raw = dataclasses.replace(raw, captions=captions)
    batch = family.encode(raw)
    tensors = {f"cond.{name}": value.cpu() for name, value in batch.cond.items()}
    if batch.images is not None:
        tensors["images"] = batch.images.cpu()
    if data.flip and raw.images is not None:
        mirrored = family.encode(dataclasses.replace(raw, images=raw.images.flip(3)))
        tensors["mirrored"] = mirrored.x0.cpu()
    return tensors


class LatentCacheDataset(Dataset):
    """A cache in the place of the data it was made of.

    Args:
        config: the ``data`` section.
        family: the opened teacher.
        needs_images: whether the training needs more than prompts.

    Raises:
        ValueError: if it is incomplete, was made by other encoders, or lacks what the training asks for.
    """

    num_classes = None
    is_encoded = True

    def __init__(self, config: DataConfig, family: Family, *, needs_images: bool = True) -> None:
        self.shards = Shards(str(config.path), KIND)
        self._check(config, family, needs_images)
        lines = (self.shards.folder / CAPTIONS).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        self._names = [row["name"] for row in rows]
        self.captions = [row["text"] for row in rows] if family.takes_text else None
        self.size, self.flip, self.caption_dropout = family.image_shape, config.flip, config.caption_dropout

    def _check(self, config: DataConfig, family: Family, needs_images: bool) -> None:
        found, wanted = self.shards.manifest, encoders(family)
        changed = [
            key for key in sorted({*found["encoders"], *wanted}) if found["encoders"].get(key) != wanted.get(key)
        ]
        if changed:
            raise ValueError(
                f"data.path: {config.path} was made by another {', '.join(changed)} than this teacher's; make a cache "
                f"of its own with {KIND.script}"
            )
        if found["sample_shape"] != list(family.sample_shape):
            raise ValueError(
                f"data.path: {config.path} holds {found['sample_shape']}, the teacher sees {list(family.sample_shape)}"
            )
        if needs_images and "images" not in self.shards.names:
            raise ValueError(f"data.path: {config.path} was made of prompts; the method trains on images")
        if needs_images and (fit := found.get("fit")) != config.fit:
            raise ValueError(f"data.fit: {config.path} was made with {fit!r}; found {config.fit!r}")
        if config.flip and "mirrored" not in self.shards.names:
            raise ValueError(f"data.flip: {config.path} holds no mirrored images; make it anew with data.flip=true")

    def __len__(self) -> int:
        return len(self.shards) - 1

    def name(self, index: int) -> str:
        """The name of the sample that was encoded."""
        return self._names[index]

    def load(self, indices: Sequence[int]) -> RawBatch:
        """Captions only: the rest is for :meth:`encode`."""
        captions = None if self.captions is None else tuple(self.captions[index] for index in indices)
        return RawBatch(None, None, captions, tuple(indices))

    def encode(self, family: Family, raw: RawBatch) -> Batch:
        """What the family would have made of the batch; a caption that was dropped has the empty one's row."""
        del family
        texts = raw.captions or ["none"] * len(raw.indices)
        told = [index if text else len(self) for index, text in zip(raw.indices, texts, strict=True)]
        names = [name for name in self.shards.names if name.startswith("cond.")]
        cond = {name.removeprefix("cond."): self.shards.rows(name, told) for name in names}
        images = self.shards.rows("images", raw.indices) if "images" in self.shards.names else None
        if images is not None and raw.mirrored is not None:
            turned = raw.mirrored.view(-1, 1, 1, 1)
            images = torch.where(turned, self.shards.rows("mirrored", raw.indices), images)
        return Batch(images, cond, len(raw.indices))
