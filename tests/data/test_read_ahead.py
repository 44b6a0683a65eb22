"""Stored samples: read ahead by a thread, in half where that loses nothing."""

import threading

import pytest
import torch

from stepdistill.batch import Batch, RawBatch
from stepdistill.benchmark.data_speed import FORMAT as FORMAT_OF_CACHE
from stepdistill.benchmark.data_speed import StoredRows, speed_table, write_cache
from stepdistill.data.loader import AHEAD, loader
from stepdistill.data.shard_writing import write_or_check_manifest, write_shards
from stepdistill.data.shards import ShardFormat, Shards

FORMAT = ShardFormat(key="data.path", rows="rows", manifest="rows.json", script="scripts/rows.py")


class Numbers(StoredRows):
    """Rows that are their own numbers."""

    def __init__(self, damaged_from=100):
        self.read, self._damaged_from = [], damaged_from

    def __len__(self):
        return 10

    def read_encoded(self, raw: RawBatch) -> Batch:
        if len(self.read) >= self._damaged_from:
            raise ValueError("shard 7 is damaged")
        self.read.append(threading.current_thread().name)
        return Batch(torch.tensor(raw.indices), {}, len(raw.indices))


def test_batches_come_in_order_from_a_thread_that_reads_a_little_ahead():
    data = Numbers()
    batches = loader(data, batch_size=4, seed=3, num_workers=2)
    found = [next(batches) for _ in range(6)]
    batches.close()
    assert all(batch.encoded.images.tolist() == list(batch.indices) for batch in found)
    assert sorted(index for batch in found[:5] for index in batch.indices) == sorted([*range(10)] * 2)
    assert {name.partition("_")[0] for name in data.read} == {"data"} and len(data.read) <= 6 + AHEAD
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data_")]


def test_what_cannot_be_read_is_said_at_its_batch():
    batches = loader(Numbers(damaged_from=2), batch_size=4, seed=3)
    next(batches), next(batches)
    with pytest.raises(ValueError, match="shard 7 is damaged"):
        next(batches)


def test_conditions_are_halved_only_where_that_loses_nothing(tmp_path):
    exact, other = torch.tensor([[1.5, -0.25], [3.0, 0.0]]), torch.tensor([[0.1, 1.5], [1.0, 2.0]])

    def make(rows: range) -> dict[str, torch.Tensor]:
        return {"images": exact, "cond.a": exact if rows.start else other, "cond.b": exact, "cond.c": torch.arange(2)}

    write_or_check_manifest(tmp_path / "rows.json", {"count": 4, "shard_size": 2}, "rows")
    write_shards(tmp_path / "rows.json", "rows", make)
    rows = Shards(tmp_path, FORMAT)
    assert [rows.layout(1)[name][0] for name in rows.names] == ["BF16", "BF16", "I64", "F32"]
    assert rows.layout(0)["cond.a"][0] == "F32"
    found = rows.rows("cond.a", [3, 0, 1])
    assert found.dtype == torch.float32 and torch.equal(found, torch.stack([exact[1], other[0], other[1]]))
    found = Batch(None, {"a": rows.rows("cond.a", [3, 2])}, 2)  # it is single precision on the device at last
    assert found.cond["a"].dtype == torch.bfloat16 and torch.equal(found.widened().cond["a"], exact.flip(0))
    assert torch.equal(rows.rows("cond.c", [1, 2]), torch.tensor([1, 0]))


def test_a_shard_is_mapped_and_not_read(tmp_path):
    """Its tensors lie where its file is in memory, so a large one takes no more than the rows that are looked at."""
    rows = Shards(write_cache(tmp_path, 8, 7), FORMAT_OF_CACHE)
    places = [rows._tensor(name, 0).data_ptr() for name in rows.names]
    assert max(places) - min(places) < (tmp_path / "shard-00000.safetensors").stat().st_size


def test_the_table_of_speeds(tmp_path):
    lines = speed_table(tmp_path, count=8, samples=64).splitlines()
    assert len(lines) == 7 and all(line.count("|") == 4 for line in lines)
