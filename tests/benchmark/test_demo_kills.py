"""The demo on the embedded teacher of faces, killed: the same command goes on to the same table and picture."""

import functools
import json
import signal

import pytest
from training.processes import started, wait_until

from stepdistill.benchmark.demo import demo

SMALLER = [
    "train.steps=12", "train.save_every=3", "train.sample_every=12", "data.batch_size=8", "demo.num_samples=20",
    "demo.search_samples=4", "demo.solvers={DDIM: [1], UniPC: [2]}", "demo.student_calls=[1, 2]",
    "demo.teacher_steps=4", "demo.reference=faces-held-out", "demo.metrics=[fd, clip, adherence]",
]  # fmt: skip
"""What makes a demo of seconds of ``configs/demo.yaml``."""
MACHINE = ("seconds_per_image", "timing", "training", "subject", "pipeline", "peak_memory_mb")
"""Columns that tell of the machine or the folder."""


def run(folder):
    return functools.partial(demo, "configs/demo.yaml", [*SMALLER, f"train.output_dir={folder / 'run'}"])


def rows(folder):
    found = json.loads((folder / "run/result.json").read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in MACHINE} for row in found]


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
    file = folder / "run/result.json"
    return file.is_file() and len(json.loads(file.read_text())["rows"]) >= count


@pytest.mark.product
def test_a_killed_demo_goes_on_to_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(whole)
    kill_when(killed, lambda: any(killed.glob("run/checkpoint-*")))
    kill_when(killed, lambda: measured(killed, 1))
    kill_when(killed, lambda: measured(killed, len(rows(whole)) - 1))
    finished(killed)
    assert rows(killed) == rows(whole)
    weights = "run/pipeline/unet/diffusion_pytorch_model.safetensors"
    for name in ("run/report.png", weights):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
