"""Kills at random points: whatever is started again ends in the same bits, or says why not in one sentence.

``pytest -m product -s -k kills`` prints where the kills hit and how the runs ended.
"""

import collections
import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import time

import pytest
from contracts.cases import make_run, save_images
from training.processes import started

from stepdistill.data.base import DataConfig
from stepdistill.data.datasets import open_data
from stepdistill.data.latent_cache import CacheConfig, make_cache
from stepdistill.families.sd import SD

STEPS = 8
SETTINGS = {"steps": STEPS, "save_every": 1, "log_every": 1, "sample_every": 4, "ema": 0.9, "keep": 2, "timeout": 5.0}
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree"}
"""Events of the interpreter that change files, besides opening one for writing."""
INSIDE = {"save": "checkpoint-", "export": "/pipeline", "cache": "/cache"}
"""What the paths of these events contain."""


def train(folder):
    make_run(folder, "progressive", **SETTINGS).train()


def cache(folder):
    family = SD.tiny()
    channels, *size = family.image_shape
    data = DataConfig(name="images", path=str(folder / "images.npz"), batch_size=4)
    dataset = open_data(data, channels=channels, size=tuple(size), num_classes=None, takes_text=True)
    make_cache(family, dataset, data, CacheConfig(output_dir=str(folder / "cache"), shard_size=3))


def prepare(folder, world):
    """Teacher and data, which processes would otherwise write at the same time."""
    make_run(folder, "progressive", **SETTINGS)
    if not world:
        save_images(SD.tiny(), folder / "images.npz")


@dataclasses.dataclass(frozen=True)
class Kill:
    """Where a kill hits."""

    world: int
    """Number of ranks."""
    rank: int
    inside: str | None
    """One of :data:`INSIDE`, or None for any moment."""
    share: float
    """How far into the run, or into the changes of files there, in [0, 1)."""

    def function(self, folder):
        return lambda: (cache if self.inside == "cache" else train)(folder)


def watched(function, folder, act):
    """``function``, with ``act`` called before every change of a file in ``folder``."""

    def changes(event, args):
        opens = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        path = str(args[0]) if args else ""
        if (opens or event in CHANGES) and path.startswith(str(folder)):
            act(path)

    def run():
        sys.addaudithook(changes)
        function()

    return run


def counted_in(kill, folder):
    """How many changes of files an undisturbed run makes there."""
    root = folder / ("cache" if kill.inside == "cache" else "run")
    counts = folder / "counts"
    counts.mkdir()

    def note(path):
        if INSIDE[kill.inside] in path:
            with (counts / os.environ.get("RANK", "0")).open("a") as file:
                file.write(".")

    with started(folder, watched(kill.function(folder), root, note), kill.world) as processes:
        assert processes.wait(600) == [0] * kill.world
    return (counts / "0").stat().st_size


def killed(kill, folder, total, seconds):
    """Start a run, kill it, and return the codes of its ranks."""
    if kill.inside is None:
        with started(folder, kill.function(folder), kill.world) as processes:
            time.sleep(0.9 * kill.share * seconds)
            if not processes.ended():
                processes.kill(kill.rank)
            return checked(processes, kill)
    left = [1 + int(kill.share * total)]

    def count_down(path):
        left[0] -= INSIDE[kill.inside] in path and int(os.environ.get("RANK", "0")) == 0
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    root = folder / ("cache" if kill.inside == "cache" else "run")
    with started(folder, watched(kill.function(folder), root, count_down), kill.world) as processes:
        return checked(processes, kill)


def checked(processes, kill):
    """The codes, after a look at those who survived: they have said in a sentence whom they lost, or had ended."""
    codes = processes.wait(60)
    for rank, code in enumerate(codes):
        assert code in (0, -9, 2), f"{kill}: {codes}: {processes.output(rank)[-3000:]}"
        said = "did not answer" in processes.output(rank) or "sentence: " in processes.output(rank)
        assert code != 2 or (said and "Traceback" not in processes.output(rank)), processes.output(rank)[-3000:]
    return codes


def result(folder, *, is_cache):
    """Hashes of everything that must not depend on a kill; rows of the log without the time."""
    root = folder / ("cache" if is_cache else "run")
    kept = [root] if is_cache else [root / f"checkpoint-{STEPS}", *root.glob("pipeline*")]
    found = {}
    for place in kept:
        for path in sorted(place.rglob("*")):
            if path.suffix in (".safetensors", ".jsonl", ".png"):
                content = path.read_bytes().replace(str(folder).encode(), b"")  # captions are by file name
                found[str(path.relative_to(root))] = hashlib.sha256(content).hexdigest()
    if not is_cache:
        rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        found["rows"] = json.dumps(
            [{key: value for key, value in row.items() if not key.startswith("time")} for row in rows]
        )
    assert len(found) > 1
    return found


def plan(count):
    """Kills of which half hit two ranks, and a third hits saves, exports and the writing of caches."""
    chosen = random.Random(int(os.environ.get("KILLS_SEED", "13")))
    kills = []
    for number in range(count):
        world = 1 + number % 2
        inside = None
        if number % 3 == 0:
            inside = chosen.choice(["save", "export", "cache"] if world == 1 else ["save", "export"])
        kills.append(Kill(world, chosen.randrange(world) if inside is None else 0, inside, chosen.random()))
    return kills


def test_the_plan_is_what_the_promise_says():
    kills = plan(50)
    assert sum(kill.world == 2 for kill in kills) == 25
    assert sum(kill.inside is not None for kill in kills) == 17 >= 50 / 3
    assert {kill.inside for kill in kills} == {None, *INSIDE} and {kill.rank for kill in kills} == {0, 1}


@pytest.mark.product
def test_kills_at_random_points_end_in_the_same_bits_or_a_sentence(tmp_path, capsys):
    """RELIABILITY row 1 and RELIABILITY row 2, for runs of one and two ranks, and for caches."""
    straight, totals, seconds, outcomes = {}, {}, {}, collections.Counter()
    for number, kill in enumerate(plan(int(os.environ.get("KILLS", "50")))):
        is_cache = kill.inside == "cache"
        if (kill.world, is_cache) not in straight:
            folder = tmp_path / f"straight-{kill.world}-{is_cache}"
            prepare(folder, 0 if is_cache else kill.world)
            began = time.monotonic()
            with started(folder, kill.function(folder), kill.world) as processes:
                assert processes.wait(600) == [0] * kill.world, processes.output(0)[-3000:]
            seconds[kill.world] = time.monotonic() - began
            straight[kill.world, is_cache] = result(folder, is_cache=is_cache)
        if kill.inside and (kill.world, kill.inside) not in totals:
            folder = tmp_path / f"counted-{kill.world}-{kill.inside}"
            prepare(folder, 0 if is_cache else kill.world)
            totals[kill.world, kill.inside] = counted_in(kill, folder)
        for attempt in range(20):  # until the kill comes before the end
            folder = tmp_path / f"kill-{number}-{attempt}"
            prepare(folder, 0 if is_cache else kill.world)
            codes = killed(kill, folder, totals.get((kill.world, kill.inside), 0), seconds[kill.world])
            if codes[kill.rank] == -9:
                break
            kill = dataclasses.replace(kill, share=0.8 * kill.share)
        assert codes[kill.rank] == -9, f"{kill}: {codes}"
        ended = resume(kill, folder)
        if ended == "the same bits":
            assert result(folder, is_cache=is_cache) == straight[kill.world, is_cache], kill
        outcomes[f"{kill.world} ranks", kill.inside or "any moment", ended] += 1
        with capsys.disabled():
            print(f"{number + 1}: {kill}: {codes}: {ended}", flush=True)
    with capsys.disabled():
        for where, count in sorted(outcomes.items()):
            print(f"{count:4d}  {', '.join(where)}")


def resume(kill, folder):
    """Start the same run again, and say how it ended."""
    with started(folder, kill.function(folder), kill.world) as processes:
        codes = processes.wait(600)
    if codes == [0] * kill.world:
        return "the same bits"
    assert codes[0] == 2 and "sentence: " in processes.output(0), f"{kill}: {codes}: {processes.output(0)[-3000:]}"
    return "a sentence"
