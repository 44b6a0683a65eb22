"""Shards that several processes write at once: each once, the same bytes, and whole after any kill."""

import fcntl
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from training.processes import wait_until

from stepdistill.data.shard_writing import lock_of, write_or_check_manifest, write_shards
from stepdistill.data.shards import ShardFormat, Shards, shard_path
from stepdistill.files.locks import locked, try_locked

FORMAT = ShardFormat(key="data.path", rows="rows", manifest="rows.json", script="scripts/rows.py")
MANIFEST = {"count": 22, "shard_size": 2}


def write(folder: Path, stuck_at: int | None = None) -> None:
    """Write what is missing, and note every shard that this process made; ``stuck_at`` one it never ends."""

    def make(rows: range) -> dict[str, torch.Tensor]:
        with (folder / "made.txt").open("a") as log:
            log.write(f"{rows.start}\n")
        time.sleep(60 if rows.start == stuck_at else 0.002)
        return {"x": torch.tensor(rows, dtype=torch.float32)}

    write_or_check_manifest(folder / "rows.json", MANIFEST, "rows")
    write_shards(folder / "rows.json", "rows", make)


def started(folder: Path, **options) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=write, args=(folder,), kwargs=options)
    process.start()
    return process


def made(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "made.txt").read_text().split()]


def alone(folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    write(folder)
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


def test_several_processes_make_every_shard_once(tmp_path):
    expected, together = alone(tmp_path / "alone"), tmp_path / "together"
    together.mkdir()
    processes = [started(together) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(made(together)) == list(range(0, 22, 2))
    assert {path.name: path.read_bytes() for path in together.glob("shard-*")} == expected
    one, other = (json.loads((folder / "rows.json").read_text()) for folder in (tmp_path / "alone", together))
    assert one == other
    assert Shards(together, FORMAT).rows("x", range(22)).tolist() == list(range(22))
    assert {path.suffix for path in together.iterdir()} == {".json", ".txt", ".safetensors"}


def test_a_killed_process_leaves_its_shard_to_the_others(tmp_path):
    expected, folder = alone(tmp_path / "alone"), tmp_path / "killed"
    folder.mkdir()
    doomed = started(folder, stuck_at=4)
    wait_until(lambda: (folder / "made.txt").is_file() and 4 in made(folder))
    helper = started(folder)  # makes all others, and then waits
    wait_until(lambda: len(list(folder.glob("shard-*.safetensors"))) == 10)
    assert helper.is_alive()
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join(60)
    helper.join(60)
    assert helper.exitcode == 0 and made(folder).count(4) == 2
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == expected


def test_what_a_kill_leaves_half_written_is_made_anew(tmp_path):
    expected, folder = alone(tmp_path / "alone"), tmp_path / "half"
    folder.mkdir()
    write_or_check_manifest(folder / "rows.json", MANIFEST, "rows")
    shard_path(folder, 3).with_name("shard-00003.safetensors.partial").write_bytes(b"half")
    (folder / "rows.json.partial").write_text("{")
    lock_of(shard_path(folder, 3)).touch()
    write(folder)
    assert {path.name: path.read_bytes() for path in folder.glob("shard-*")} == expected


def test_a_lock_is_held_by_one(tmp_path):
    with locked(tmp_path / "a/.lock"), try_locked(tmp_path / "a/.lock") as second, try_locked(tmp_path / "b") as other:
        assert not second and other
    with try_locked(tmp_path / "a/.lock") as again:
        assert again
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and not list((tmp_path / "a").iterdir())


def test_a_child_that_was_forked_meanwhile_holds_no_lock(tmp_path):
    with locked(tmp_path / "lock"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        waiting = os.open(tmp_path / "lock", os.O_RDWR)
    try:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while another descriptor's lock is there
    finally:
        os.close(waiting)
        child.kill()


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="lock"), locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()
