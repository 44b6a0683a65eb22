"""Damaged files of every kind end in one sentence that names the file, and touch nothing outside (issue 13, item 7)."""

import collections
import random
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing.attempts import Outcome, Watch, attempt
from fuzzing.subjects import SUBJECTS, Subject, make_world

SHORT, LONG = 210, 5_000
"""Tries of ``make test`` and of ``-m product``, over all subjects."""


@pytest.fixture(scope="session")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Path]:
    """A folder ``work`` with whole files of every kind, and a copy of it from which it is restored."""
    folder = tmp_path_factory.mktemp("fuzzing")
    (folder / "evil.py").write_text("open('/nowhere/evil', 'w')")
    make_world(folder / "work")
    shutil.copytree(folder / "work", folder / "whole")
    before = tempfile.tempdir
    yield folder
    tempfile.tempdir = before


def restore(world: Path) -> Path:
    work = world / "work"
    shutil.rmtree(work)
    shutil.copytree(world / "whole", work)
    (work / "tmp").mkdir()
    tempfile.tempdir = str(work / "tmp")
    return work


def tries(subject: Subject, world: Path, watch: Watch, seeds: range) -> dict[int, Outcome]:
    """Outcomes by seed; a single one is repeated by the range of its seed alone."""
    outcomes = {}
    for seed in seeds:
        rng = random.Random(zlib.crc32(subject.id.encode()) + seed)
        work = restore(world)
        target = work / subject.path
        target.write_bytes(rng.choice(subject.changes)(target.read_bytes(), rng))
        outcomes[seed] = attempt(subject.run, work, subject.named, watch)
    return outcomes


def check(subject: Subject, world: Path, watch: Watch, count: int, record) -> None:
    outcomes = tries(subject, world, watch, range(count))
    counts = collections.Counter(outcome.kind for outcome in outcomes.values())
    record("counts", dict(counts))
    print(f"{subject.id}: {dict(counts)}")
    faults = [f"seed {seed}: {outcome.kind}\n{outcome.text}" for seed, outcome in outcomes.items() if outcome.is_fault]
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults[:5])


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.id)
def test_whole_files_are_read(subject, world, watch):
    outcome = attempt(subject.run, restore(world), subject.named, watch)
    assert outcome == Outcome("done") or subject.path == "overrides.txt", outcome.text


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.id)
def test_damaged_files_end_in_a_sentence(subject, world, watch, record_property):
    check(subject, world, watch, SHORT // len(SUBJECTS), record_property)


@pytest.mark.product
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.id)
def test_many_damaged_files_end_in_a_sentence(subject, world, watch, record_property):
    check(subject, world, watch, -(-LONG // len(SUBJECTS)), record_property)
