"""Another number of processes: the same samples and noise in every step, or a refusal."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contracts.cases import make_run, sections, teacher_for, train_until
from safetensors.torch import load_file

from stepdistill.batch import RawBatch
from stepdistill.config import to_yaml
from stepdistill.data.base import Dataset
from stepdistill.data.loader import loader
from stepdistill.randomness import Draws
from stepdistill.training.checkpoint import Checkpoint, CheckpointError
from stepdistill.training.division import Division, resumed_division
from stepdistill.training.run_state import SavedState

LENGTH, TOTAL = 30, 12


class Numbers(Dataset):
    """Samples that are their own indices."""

    size, num_classes, flip = (1, 1, 1), None, False

    def __len__(self):
        return LENGTH

    def name(self, index):
        return str(index)

    def load(self, indices):
        return RawBatch(torch.tensor(indices).float().view(-1, 1, 1, 1), None, None, tuple(indices))


def taken(division, first_step, steps):
    """By step: (sample, its noise) of the whole batch, in the order of its places, over all ranks and micro-batches."""
    found = [[None] * TOTAL for _ in range(steps)]
    for rank in range(division.world):
        batches = loader(
            Numbers(), batch_size=division.batch_size, seed=3, start=first_step * division.accumulation,
            rank=rank, world=division.world,
        )  # fmt: skip
        for step in range(steps):
            for micro in range(division.accumulation):
                part, raw = micro * division.world + rank, next(batches)
                parts = division.world * division.accumulation
                noise = Draws(first_step + step, division.batch_size, rank=part, world=parts).normal(2)
                for place, pair in enumerate(zip(raw.indices, noise.tolist(), strict=True)):
                    assert found[step][part * division.batch_size + place] is None
                    found[step][part * division.batch_size + place] = pair
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("before", [Division(2, 1, 6), Division(1, 3, 4), Division(4, 1, 3)])
def test_resumed_by_other_processes_every_step_has_the_same_samples_and_noise(before, world):
    """FAULTS 5; RELIABILITY row 12: ranks disjoint, their union the samples that remain, across epochs."""
    expected = taken(before, 0, 7)
    after = Division(world, 1, 4).with_total(before.total)
    assert after.total == TOTAL and after.batch_size <= 4
    assert taken(before, 0, 3) + taken(after, 3, 4) == expected
    indices = [index for step in expected for index, _ in step]
    assert sorted(indices[:LENGTH]) == sorted(indices[LENGTH : 2 * LENGTH]) == list(range(LENGTH))


def test_micro_batches_never_become_larger_than_configured():
    assert Division(1, 1, 64).with_total(128) == Division(1, 2, 64)
    assert Division(2, 1, 64).with_total(128) == Division(2, 1, 64)
    assert Division(4, 2, 64).with_total(128) == Division(4, 1, 32)
    assert Division(1, 1, 4).with_total(10) == Division(1, 5, 2)
    assert Division(3, 1, 64).with_total(128) is None


def recorded(before):
    state = SavedState(stage=0, stage_name="train", done=5, config={}, division=before)
    return Checkpoint(Path("checkpoint-5"), 5, state)


def test_processes_that_cannot_share_a_step_are_refused_with_both_numbers():
    """FAULTS 5; RELIABILITY row 12."""
    with pytest.raises(CheckpointError) as error:
        resumed_division(recorded(Division(2, 1, 64)), Division(3, 1, 64))
    assert "made by 2 processes (128 samples a step = 2 x accumulation 1 x 64), which 3 processes" in str(error.value)
    assert "a number of processes that divides 128" in str(error.value)


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (Division(2, 1, 64), "resuming with 1 (128 samples a step = 1 x accumulation 2 x 64): every step has"),
        (None, "does not record how many processes made it; assumed to be 1, as now"),
        (Division(1, 1, 64), None),
    ],
)
def test_one_note_tells_what_changes(before, said, caplog, tmp_path):
    """REPORTS 5; RELIABILITY row 12: the note on random numbers."""
    make_run(tmp_path, "progressive").trainer()  # its accelerator lets loggers speak
    with caplog.at_level(logging.WARNING):
        division = resumed_division(recorded(before), Division(1, 1, 64))
    assert division.total == (before or division).total
    assert len(caplog.messages) == (said is not None) and (said or "") in caplog.text
    assert said is None or "noise" not in said or "dropout" in caplog.text


def test_the_note_says_that_buckets_have_another_order(caplog, tmp_path):
    make_run(tmp_path, "progressive").trainer()
    with caplog.at_level(logging.WARNING):
        resumed_division(recorded(Division(2, 1, 64)), Division(1, 1, 64), has_buckets=True)
    assert "data.buckets have another order from here on" in caplog.text and "same samples" not in caplog.text


def test_a_run_of_two_processes_goes_on_with_one(tmp_path):
    """REPORTS 5: the batch of a step stays that of the checkpoint, and so does what is trained."""
    straight = make_run(tmp_path / "straight", "progressive", accumulation=2)
    straight.train()
    train_until(make_run(tmp_path / "two", "progressive", accumulation=2, save_every=1), 2)
    state = tmp_path / "two/run/checkpoint-2/state.json"
    pretend(state, "division", {"world": 2, "accumulation": 1, "batch_size": 4})
    pretend(state, "config", json.loads(state.read_text())["config"] | {"train.accumulation": 1})
    make_run(tmp_path / "two", "progressive", save_every=1).train()
    one, two = (load_file(tmp_path / name / "run/checkpoint-4/weights.safetensors") for name in ("straight", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def pretend(state, key, value):
    """Rewrite one entry of a checkpoint's state, and its manifest."""
    from stepdistill.training import checkpoint

    content = json.loads(state.read_text()) | {key: value}
    state.write_text(json.dumps(content))
    manifest = json.loads((state.parent / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["state.json"] = {"size": state.stat().st_size, "sha256": checkpoint.sha256_of(state)}
    (state.parent / "manifest.json").write_text(json.dumps(manifest | {"sha256": checkpoint._digest(manifest)}))


@pytest.mark.product
def test_one_process_two_and_one_again_train_to_the_weights_of_one(tmp_path):
    """FAULTS 5; RELIABILITY row 12, with real processes: up to rounding, the weights of a run that kept its own."""
    plain = sections(tmp_path, teacher_for("dmd2"), "dmd2", steps=6, save_every=2, keep=9, accumulation=2)
    (tmp_path / "run.yaml").write_text(to_yaml(plain))
    distil(1, tmp_path)
    expected = load_file(tmp_path / "run/checkpoint-6/weights.safetensors")
    for done, processes in ((2, 2), (4, 1)):  # from 2 on with two, from 4 on with one
        for step in range(done + 2, 8, 2):
            shutil.rmtree(tmp_path / f"run/checkpoint-{step}")
        shutil.rmtree(tmp_path / "run/pipeline")
        assert "the same samples and noise" in distil(processes, tmp_path)
    found = load_file(tmp_path / "run/checkpoint-6/weights.safetensors")
    assert max((expected[name] - found[name]).abs().max() for name in expected) < 1e-5


def distil(processes, folder):
    """Run ``stepdistill train`` in new processes; return what they said."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launcher, "-m", "stepdistill.cli", "train", "--config", str(folder / "run.yaml")],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stderr
