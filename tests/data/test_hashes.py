"""Caches and pairs: a hash for every file, damage that is named, and shards that are whole or absent after any kill."""

from __future__ import annotations

import json
import os
import random
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stepdistill.data import shards
from stepdistill.data.base import DataConfig
from stepdistill.data.cached_texts import CAPTIONS
from stepdistill.data.datasets import open_data
from stepdistill.data.latent_cache import CacheConfig, LatentCacheDataset, make_cache
from stepdistill.data.ode_pairs import Pairs, PairsConfig, make_pairs
from stepdistill.data.shard_writing import write_or_check_manifest, write_shards
from stepdistill.data.shards import ShardFormat, Shards, shard_path
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD

FORMAT = ShardFormat(key="data.path", rows="rows", manifest="rows.json", script="scripts/rows.py")
COUNT = 10


def make(rows: range) -> dict[str, torch.Tensor]:
    values = torch.tensor(rows, dtype=torch.float32)
    return {"images": values[:, None, None].expand(-1, 4, 4), "cond.label": torch.tensor(rows)}


def written(folder: Path) -> Path:
    write_or_check_manifest(folder / "rows.json", {"count": COUNT, "shard_size": 4}, "rows")
    write_shards(folder / "rows.json", "rows", make)
    return folder


def flip(path: Path, place: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def as_of_old(folder: Path) -> None:
    """What caches were before they had hashes."""
    manifest = json.loads((folder / "rows.json").read_text())
    del manifest["sha256"]
    (folder / "rows.json").write_text(json.dumps(manifest))


def test_a_flipped_bit_is_found_before_a_row_of_its_shard_is_used(tmp_path: Path) -> None:
    """FAULTS 16."""
    flip(shard_path(written(tmp_path), 1))
    rows = Shards(tmp_path, FORMAT)
    assert rows.rows("images", [0, 9, 3])[:, 0, 0].tolist() == [0, 9, 3]
    for _ in range(2):  # every time, not only the first
        with pytest.raises(ValueError, match=r"^data\.path: .*shard-00001\.safetensors is not what .* wrote .*SHA-256"):
            rows.rows("images", [0, 5])
    shard_path(tmp_path, 1).unlink()
    assert Shards(written(tmp_path), FORMAT).rows("images", [5])[0, 0, 0] == 5


def test_a_shard_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, hashed = Shards(written(tmp_path), FORMAT), []
    monkeypatch.setattr(shards, "sha256_of", lambda path, real=shards.sha256_of: hashed.append(path.name) or real(path))
    for _ in range(3):
        rows.rows("images", [0, 1, 9])
        rows.rows("cond.label", [0, 1, 9])
    assert hashed == ["shard-00000.safetensors", "shard-00002.safetensors"]


def test_shards_without_hashes_open_with_one_warning_and_get_them(tmp_path: Path) -> None:
    """FAULTS 16: old caches still open."""
    as_of_old(written(tmp_path))
    with pytest.warns(
        UserWarning, match=r"3 of 3 shards were written without hashes.*run scripts/rows\.py again"
    ) as told:
        assert Shards(tmp_path, FORMAT).rows("images", range(COUNT))[:, 0, 0].tolist() == list(range(COUNT))
    assert len(told) == 1
    before = [shard_path(tmp_path, number).stat().st_mtime_ns for number in range(3)]
    Shards(written(tmp_path), FORMAT)  # no warning
    assert before == [shard_path(tmp_path, number).stat().st_mtime_ns for number in range(3)]
    flip(shard_path(tmp_path, 2))
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors is not what"):
        Shards(tmp_path, FORMAT).rows("images", [9])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_cache_names_the_file(tmp_path: Path, value: float) -> None:
    """RELIABILITY row 16."""
    as_of_old(written(tmp_path))
    tensors = load_file(shard_path(tmp_path, 1))
    tensors["images"][2, 1, 1] = value
    save_file(tensors, shard_path(tmp_path, 1))
    with pytest.warns(UserWarning):
        rows = Shards(tmp_path, FORMAT)
    assert torch.isfinite(rows.rows("images", [5])).all()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: images, row 2: expected finite numbers, got NaN"):
        rows.rows("images", [0, 5, 6])


def test_nan_is_not_written(tmp_path: Path) -> None:
    """RELIABILITY row 16: of an encoder or a teacher, such as a VAE in half precision."""

    def broken(rows: range) -> dict[str, torch.Tensor]:
        tensors = make(rows)
        tensors["images"] = tensors["images"].clone()
        tensors["images"][rows.index(6) if 6 in rows else 0, 0, 0] = float("nan") if 6 in rows else 0
        return tensors

    write_or_check_manifest(tmp_path / "rows.json", {"count": COUNT, "shard_size": 4}, "rows")
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: images of rows\[6\] became NaN or infinite"):
        write_shards(tmp_path / "rows.json", "rows", broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "shard-00000.safetensors"]


def test_a_kill_at_every_rename_leaves_whole_shards_and_their_hashes(tmp_path: Path) -> None:
    """FAULTS 16: killed (-9) before and after every file is put in its place; then the same command again."""
    whole = written(tmp_path / "whole")
    for kill in range(14):  # the manifest, and for each of three shards its hash and the shard, before and after
        folder, child = tmp_path / f"{kill}", os.fork()
        if child == 0:
            try:
                _die_at(kill)
                written(folder)
            finally:
                os._exit(0)  # the child must never go on as a second pytest
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        for path in folder.glob("shard-*.safetensors"):
            assert path.read_bytes() == (whole / path.name).read_bytes()
        written(folder)
        assert not list(folder.glob("*.partial"))
        assert (folder / "rows.json").read_bytes() == (whole / "rows.json").read_bytes()
        assert torch.equal(Shards(folder, FORMAT).rows("images", range(COUNT)), make(range(COUNT))["images"])
    assert kill == 13


def _die_at(kill: int) -> None:
    """Kill this process at the rename ``kill // 2``, before it or after."""
    real, calls = Path.replace, [0]

    def replace(self: Path, target: Path) -> None:
        if calls[0] == kill // 2 and kill % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, target)
        if calls[0] == kill // 2:
            os.kill(os.getpid(), signal.SIGKILL)
        calls[0] += 1

    Path.replace = replace  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"rows\.json: expected JSON"),
        ("[1, 2]", r"rows\.json: "),
        ('{"count": 10}', r"rows\.json: shard_size: missing"),
        ('{"count": "10", "shard_size": 4}', r"rows\.json: count: expected whole number, got '10'"),
        ('{"count": 10, "shard_size": 0}', r"rows\.json: expected count and shard_size of at least 1 .*got 10 and 0"),
        ('{"count": -1, "shard_size": 4}', r"rows\.json: expected count and shard_size of at least 1 .*got -1 and 4"),
        ('{"count": 10, "shard_size": 4, "sha256": [1]}', r"rows\.json: sha256: expected a section"),
        ('{"count": 10, "shard_size": 4, "sha256": {"a": 1}}', r"rows\.json: sha256\.a: expected text"),
        ('{"count": 1' + "0" * 400 + ', "shard_size": 4}', r"shard-00003\.safetensors is missing|rows\.json"),
        ("[" * 5000, r"rows\.json: "),
    ],
)
def test_manifests_that_break_the_rules(tmp_path: Path, content: str, message: str) -> None:
    """FAULTS 9."""
    (written(tmp_path) / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path, FORMAT)
    (tmp_path / "rows.json").unlink()
    os.mkfifo(tmp_path / "rows.json")
    with pytest.raises(ValueError, match=r"no rows\.json in"):
        Shards(tmp_path, FORMAT)


def test_shards_of_other_caches_do_not_mix(tmp_path: Path) -> None:
    """RELIABILITY row 31: of another size, of another type, of another cache."""
    written(tmp_path)
    other = {name: tensor.contiguous() for name, tensor in make(range(4, 8)).items()}
    for tensors, message in (
        ({**other, "images": torch.zeros(4, 8, 8)}, r"shard-00001.*expected .*\[4, 4\].*got .*\[8, 8\]"),
        ({**other, "images": torch.zeros(4, 4, 4, dtype=torch.bfloat16)}, r"shard-00001.*F32.*got .*BF16"),
        ({"images": other["images"]}, r"shard-00001.*expected .*cond\.label.*got "),
        ({**other, "images": torch.zeros(3, 4, 4)}, r"shard-00001\.safetensors: expected 4 rows, got 3, 4"),
    ):
        save_file(tensors, shard_path(tmp_path, 1))
        with pytest.raises(ValueError, match=message):
            Shards(tmp_path, FORMAT)
    save_file({**other, "images": other["images"] + 1}, shard_path(tmp_path, 1))  # alike, but not the one
    with pytest.raises(ValueError, match="is not what"):
        Shards(tmp_path, FORMAT).rows("images", [4])


def cached(folder: Path) -> tuple[DataConfig, Any]:
    (folder / "p.txt").write_text("one\ntwo\nthree\n")
    family = SD.tiny()
    data = DataConfig(name="prompts", path=str(folder / "p.txt"), batch_size=2)
    dataset = open_data(data, channels=3, size=(16, 16), num_classes=None, takes_text=True)
    made = make_cache(family, dataset, data, CacheConfig(output_dir=str(folder / "cache"), shard_size=2))
    return DataConfig(name="cache", path=str(made)), family


def test_every_file_of_a_cache_has_a_hash(tmp_path: Path) -> None:
    """FAULTS 16: the captions too, which say whose caption is empty."""
    config, family = cached(tmp_path)
    manifest = json.loads((tmp_path / "cache/cache.json").read_text())
    assert set(manifest["sha256"]) == {path.name for path in (tmp_path / "cache").iterdir()} - {"cache.json"}
    assert len(LatentCacheDataset(config, family, needs_images=False)) == 3
    captions = tmp_path / "cache" / CAPTIONS
    whole = captions.read_text()
    captions.write_text(whole.replace("two", "twa"))
    with pytest.raises(ValueError, match=r"captions\.jsonl is not what"):
        LatentCacheDataset(config, family, needs_images=False)
    del manifest["sha256"]
    (tmp_path / "cache/cache.json").write_text(json.dumps(manifest))
    for content, message in (
        (whole.splitlines()[0], "expected 3 lines, one a sample, got 1"),
        (whole.replace('"two"', "2"), r"captions\.jsonl:2: 'text': expected text, .*got 2"),
        (whole.replace('"name"', '"Name"'), r"captions\.jsonl:1: "),
        ("{\n" * 3, r"captions\.jsonl:1: expected JSON"),
    ):
        captions.write_text(content)
        with pytest.warns(UserWarning, match="without hashes"), pytest.raises(ValueError, match=message):
            LatentCacheDataset(config, family, needs_images=False)


def test_pairs_have_hashes_too(tmp_path: Path) -> None:
    """FAULTS 16, RELIABILITY row 31."""
    config = PairsConfig(output_dir=str(tmp_path / "p"), count=4, solver="euler", steps=2, batch_size=2, shard_size=2)
    folder = make_pairs(Pixel.tiny(), config)
    assert len(Pairs(folder).rows([0, 3])[0]) == 2
    flip(shard_path(folder, 1))
    with pytest.raises(ValueError, match=r"^method\.pairs: .*shard-00001\.safetensors is not what"):
        Pairs(folder).rows([0, 3])


def _mutated(text: str, seed: int) -> str:
    random_, letters = random.Random(seed), list(text)
    for _ in range(random_.choice((1, 1, 2, 8))):
        place = random_.randrange(len(letters))
        match random_.randrange(4):
            case 0:
                del letters[place : place + random_.randrange(1, 20)]
            case 1:
                letters.insert(place, random_.choice('{}[]",:-0919eE\\\0\ud7ffxnull'))
            case 2:
                letters[place : place + 1] = random_.choice(("null", "-1", "1e9", '""', "[]", "{}", "NaN", "0" * 99))
            case _:
                letters[place] = random_.choice('0123456789abcdef"{}[]')
    return "".join(letters)


def test_mutated_manifests_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """FAULTS 9: 12 of 112 gave a traceback."""
    config, family = cached(tmp_path)
    manifest, opened = tmp_path / "cache/cache.json", 0
    whole = manifest.read_text()
    for seed in range(120):
        manifest.write_text(_mutated(whole, seed), encoding="utf-8")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = LatentCacheDataset(config, family, needs_images=False)
                data.encode(family, data.load([0]))
            opened += 1
        except ValueError as error:
            assert str(tmp_path) in str(error)
    assert 0 < opened < 120
