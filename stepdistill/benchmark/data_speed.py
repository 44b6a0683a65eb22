"""How many samples a second one process gets out of a cache and out of tars, with nothing else to do.

The cache is one of Stable Diffusion at 512 pixels: latents of 4 x 64 x 64 and 77 prompt tokens of 768 numbers, with and
without a text encoder of bfloat16. Tars hold JPEG images, which have to be decoded. Samples come through the loader of
a training, in its random order; the files were written just before, so they are in the memory of the system.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.batch import Batch, RawBatch
from stepdistill.benchmark.tables import markdown_table
from stepdistill.data.base import DataConfig, Dataset
from stepdistill.data.datasets import open_data
from stepdistill.data.loader import loader
from stepdistill.data.shard_writing import write_or_check_manifest, write_shards
from stepdistill.data.shards import ShardFormat, Shards

FORMAT = ShardFormat(key="data.path", rows="samples", manifest="cache.json", script="scripts/data_speed.py")
LATENTS, PROMPT = (4, 64, 64), (77, 768)
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Speed:
    """Samples a second of a kind of data."""

    name: str
    samples: int
    seconds: float
    cpu_seconds: float
    """Of all threads of the process, so that other processes on the machine do not count."""

    @property
    def cells(self) -> list[str]:
        """The row of the table."""
        return [self.name, f"{self.samples / self.seconds:,.0f}", f"{self.samples / self.cpu_seconds:,.0f}"]


class StoredRows(Dataset):
    """A cache without its teacher."""

    num_classes = None
    flip = False
    is_encoded = True

    def __init__(self, folder: Path) -> None:
        self._shards = Shards(folder, FORMAT)

    def __len__(self) -> int:
        return len(self._shards)

    def name(self, index: int) -> str:
        """Return the row."""
        return str(index)

    def load(self, indices: Sequence[int]) -> RawBatch:
        """Return indices only."""
        return RawBatch(None, None, None, tuple(indices))

    def read_encoded(self, raw: RawBatch) -> Batch:
        """Return latents and prompts."""
        prompt = self._shards.rows("cond.encoder_hidden_states", raw.indices)
        return Batch(self._shards.rows("images", raw.indices), {"encoder_hidden_states": prompt}, len(raw.indices))


def speed_table(folder: Path, count: int, samples: int) -> str:
    """Return the table of all kinds of data.

    Args:
        folder: for their files.
        count: samples in a cache; a quarter of them in a tar.
        samples: how many are read of each.
    """
    speeds: list[Speed] = []
    for name, bits in (("cache", 23), ("cache, encoder of bfloat16", 7)):
        speeds.append(measure(name, StoredRows(write_cache(folder / name, count, bits)), samples))
    for side in (64, 256, 512):
        config = DataConfig(name="images", path=str(write_tar(folder / f"{side}.tar", count // 4, side)))
        data = open_data(config, channels=3, size=(side, side), num_classes=None)
        speeds.append(measure(f"tar, JPEG of {side} x {side}, decoded", data, samples // 4))
    head = ["data", "samples a second", "samples a second of CPU time"]
    return markdown_table([head, ["---"] * len(head), *(speed.cells for speed in speeds)])


def measure(name: str, dataset: Dataset, samples: int) -> Speed:
    """Return how fast samples come, after the first epoch of a cache has checked its files."""
    batches = loader(dataset, batch_size=BATCH, seed=0)
    if dataset.is_encoded:
        next_batches(batches, -(-len(dataset) // BATCH))
    start, cpu = time.perf_counter(), time.process_time()
    taken = next_batches(batches, -(-samples // BATCH))
    return Speed(name, taken, time.perf_counter() - start, time.process_time() - cpu)


def next_batches(batches: Iterator[RawBatch], count: int) -> int:
    """Take some batches, and return the number of samples in them."""
    return sum(len(batch.indices) for batch in itertools.islice(batches, count))


def write_cache(folder: Path, count: int, bits: int) -> Path:
    """Write random latents, and prompts whose numbers have ``bits`` bits after the first."""

    def make(rows: range) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(rows.start)
        prompt = torch.randint(2**bits, (len(rows), *PROMPT), generator=generator) / 2**bits + 1
        return {
            "images": torch.randn(len(rows), *LATENTS, generator=generator),
            "cond.encoder_hidden_states": prompt,
        }

    write_or_check_manifest(folder / FORMAT.manifest, {"count": count, "shard_size": 256}, FORMAT.rows)
    write_shards(folder / FORMAT.manifest, FORMAT.rows, make)
    return folder


def write_tar(path: Path, count: int, side: int) -> Path:
    """Write smooth random images."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            content = io.BytesIO()
            small.resize((side, side), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
            entry = tarfile.TarInfo(f"{number:06d}.jpg")
            entry.size = content.tell()
            content.seek(0)
            tar.addfile(entry, content)
    return path
