"""The demo on the embedded teacher of faces, killed: the same command goes on to the same table and picture."""

import functools
import json
import signal

import pytest
from training.processes import started, wait_until

from stepdistill.benchmark.demo import demo

SMALLER = [
    "train.steps=12", "train.save_every=3", "train.log_every=1", "train.sample_every=12", "data.batch_size=8",
    "demo.num_samples=20", "demo.search_samples=4", "demo.solvers={DDIM: [1], UniPC: [2]}", "demo.student_calls=[1, 2]",
    "demo.teacher_steps=4", "demo.reference=faces-held-out", "demo.metrics=[fd, clip, adherence]",
]  # fmt: skip
"""What makes a demo of seconds of ``configs/demo.yaml``."""
MACHINE = ("seconds_per_image", "timing", "training", "subject", "pipeline", "peak_memory_mb")
"""Columns that tell of the machine or the folder."""


def run(folder):
    return functools.partial(demo, "configs/demo.yaml", [*SMALLER, f"train.output_dir={folder / 'run'}"])


def timed_rows(folder):
    return json.loads((folder / "run/result.json").read_text())["rows"]


def rows(folder):
    return [{key: value for key, value in row.items() if key not in MACHINE} for row in timed_rows(folder)]


def first_steps(folder):
    """What was logged, seconds too, of steps before the first checkpoint."""
    return (folder / "run/metrics.jsonl").read_text().splitlines()[:2]


def finished(folder):
    with started(folder, run(folder)) as processes:
        assert processes.wait(600) == [0], processes.output(0)[-3000:]


def kill_when(folder, reached):
    """Start the demo, kill it as soon as ``reached`` says so, and see that it had not ended before."""
    with started(folder, run(folder)) as processes:
        wait_until(lambda: reached() or processes.ended(), 600)
        assert not processes.ended(), processes.output(0)[-3000:]
        processes.kill(0, signal.SIGKILL)
        assert processes.wait(60) == [-signal.SIGKILL]


def measured(folder, count):
    """Return whether ``count`` rows are written."""
    return (folder / "run/result.json").is_file() and len(timed_rows(folder)) >= count


@pytest.mark.product
def test_a_killed_demo_goes_on_to_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(whole)
    kill_when(killed, lambda: any(not path.suffix for path in killed.glob("run/checkpoint-*")))
    trained = first_steps(killed)
    kill_when(killed, lambda: measured(killed, 1))
    kill_when(killed, lambda: measured(killed, len(rows(whole)) - 1))
    before = timed_rows(killed)
    finished(killed)
    assert len(trained) == 2 and first_steps(killed) == trained  # not trained anew,
    assert timed_rows(killed)[: len(before)] == before  # nor measured anew: seconds would differ
    assert rows(killed) == rows(whole)
    weights = "run/pipeline/unet/diffusion_pytorch_model.safetensors"
    for name in ("run/report.png", weights):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
