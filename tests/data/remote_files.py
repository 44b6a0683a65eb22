"""Small tars and tables that lie at addresses in tests, and what they must give."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data.base import DataConfig
from stepdistill.data.datasets import open_data
from stepdistill.data.loader import loader

parquet = pytest.importorskip("pyarrow.parquet")


def png(shade):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(shade).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            for ending, content in (("png", png(name)), ("txt", f"text {name}".encode()), ("cls", b"1")):
                entry = tarfile.TarInfo(f"{name:04d}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def table(names, group=2):
    buffer = io.BytesIO()
    import pyarrow

    rows = [
        {"image": {"bytes": png(name), "path": f"{name}.png"}, "text": f"text {name}", "label": 1} for name in names
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=group)
    return buffer.getvalue()


TARS = {"a-000.tar": tar(range(4)), "a-001.tar": tar(range(4, 7))}
TABLES = {
    "train-00000-of-00002.parquet": table(range(3)),
    "train-00001-of-00002.parquet": table(range(3, 7)),
    "test-00000-of-00001.parquet": table(range(9)),
}


def on_disk(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


def opened(path, **options):
    config = DataConfig(name="images", path=path, flip=True, **options)
    return open_data(config, channels=3, size=(8, 8), num_classes=2, takes_text=True)


def assert_same_batches(one, other, micro_batches=5):
    """Both data sets give every rank the same batches, from the beginning and from the middle."""
    for rank, world, start in ((0, 1, 0), (1, 2, 3)):
        found = [loader(data, batch_size=3, seed=1, rank=rank, world=world, start=start) for data in (one, other)]
        for _, (mine, yours) in zip(range(micro_batches), zip(*found, strict=False), strict=False):
            assert mine.indices == yours.indices and mine.captions == yours.captions
            assert torch.equal(mine.images, yours.images) and torch.equal(mine.labels, yours.labels)
