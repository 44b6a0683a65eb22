"""No number of a run comes from the environment, from a notebook, or from an earlier run of the session."""

import inspect
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, accelerator, state
from accelerate.state import AcceleratorState, GradientState
from contracts.cases import make_run
from safetensors.torch import load_file

import stepdistill
from stepdistill.networks.launcher import (
    DECIDED_HERE,
    REFUSED,
    check_environment,
    open_accelerator,
    own_device,
    remarks,
)
from stepdistill.training.parallelism import tracking

STEPS = 3


def trained(folder, **train):
    run = make_run(folder, "progressive", **{"steps": STEPS, **train})
    run.train()
    return load_file(run.folder / f"checkpoint-{STEPS}/weights.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def session():
    """A session whose accelerators are forgotten before and after."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"))


# ---------------------------------------------------------------------------------------------- environment

ASKING = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
}


def test_variables_that_are_not_heeded_change_no_bit_and_are_said(tmp_path, monkeypatch, caplog, session, plain):
    """REPORTS 4."""
    assert ASKING.keys() == DECIDED_HERE.keys()
    for name, value in ASKING.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.WARNING):
        weights = trained(tmp_path)
    assert same(weights, plain)
    for name, value in ASKING.items():
        assert caplog.text.count(f"{name}={value} is ignored") == 1


def test_what_agrees_or_asks_for_nothing_is_not_said():
    asked = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    assert remarks(asked, asked) == []
    assert remarks({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, asked) == []
    assert remarks({"NVIDIA_TF32_OVERRIDE": "1"}, {}) == [
        "NVIDIA_TF32_OVERRIDE=1 takes effect: CUDA rounds float32 products on a GPU differently"
    ]


@pytest.mark.parametrize("variable", REFUSED)
def test_ways_of_training_that_are_not_ours_are_refused(tmp_path, monkeypatch, variable):
    """REPORTS 4: before the teacher is opened, and whether or not the package is installed."""
    run = make_run(tmp_path, "progressive")
    monkeypatch.setenv(variable, "true")
    for refused in (check_environment, run.trainer, lambda: make_run(tmp_path, "progressive")):
        with pytest.raises(ValueError, match=f"{variable}: expected false, got true .* is not supported"):
            refused()
    assert not run.folder.exists()


def test_the_table_knows_every_switch_of_accelerate():
    """A new version of accelerate with another way of training is noticed here."""
    source = inspect.getsource(accelerator) + inspect.getsource(state)
    switches = {word for word in source.replace("'", '"').split('"') if word.startswith("ACCELERATE_USE_")}
    assert switches == {*REFUSED, "ACCELERATE_USE_FSDP", "ACCELERATE_USE_CPU"}


def test_each_process_has_its_own_gpu_unless_the_environment_asks_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device() == torch.device("cuda", 1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert own_device() == torch.device("cpu")


# -------------------------------------------------------------------------------------------------- session


def test_two_trainings_of_other_precisions_in_one_session(tmp_path, session, plain):
    """REPORTS 9: each ends in the weights that it would have alone, in either order."""
    bf16 = trained(tmp_path / "first", precision="bf16")
    assert same(trained(tmp_path / "second"), plain)
    assert same(trained(tmp_path / "third", precision="bf16"), bf16) and not same(bf16, plain)


def test_a_notebooks_own_accelerator_changes_nothing_and_keeps_its_state(tmp_path, session, plain):
    """REPORTS 9."""
    mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    assert same(trained(tmp_path), plain)
    assert mine.mixed_precision == "bf16"


def test_a_teacher_of_another_precision_in_one_session_is_one_sentence(session):
    """REPORTS 9: pretraining rests on accelerate's own precision."""
    open_accelerator("no")
    with pytest.raises(ValueError, match="already been initialized"):
        open_accelerator("bf16")


def test_distill_works_in_a_thread(tmp_path):
    """REPORTS 10: without signals, which only the main thread may handle."""
    run = make_run(tmp_path, "progressive", steps=STEPS)
    found = []
    thread = threading.Thread(target=lambda: found.append(run.train()))
    thread.start()
    thread.join()
    assert found == [run.folder / "pipeline"] and stepdistill.load_pipeline(found[0]) is not None


# ------------------------------------------------------------------------------------------------- trackers


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_without_its_package_is_refused_before_anything_is_written(tmp_path, monkeypatch, name):
    """REPORTS 26."""
    monkeypatch.setattr(f"stepdistill.training.parallelism.is_{name}_available", lambda: False)
    with pytest.raises(ValueError, match=rf"train.tracker: {name} is not installed; run: pip install {name}"):
        make_run(tmp_path, "progressive", tracker=name)
    assert not (tmp_path / "run").exists()


def test_a_tracker_is_started_for_the_training_and_finished_with_it():
    """So that the next run of a session does not write into this one's, and an export starts none."""
    calls, tracker = [], SimpleNamespace(finish=lambda: calls.append("finish"))
    accelerator = SimpleNamespace(log_with=["some"], init_trackers=calls.append, trackers=[tracker])
    with pytest.raises(KeyboardInterrupt), tracking(accelerator):
        raise KeyboardInterrupt
    assert calls == ["stepdistill", "finish"]


# ------------------------------------------------------------------------------------------ other processes

SCRIPT = """
from pathlib import Path
from contracts.cases import make_run
make_run(Path({folder!r}), "progressive", steps=3, log_every=3).train()
"""


@pytest.mark.product
@pytest.mark.parametrize("threads", ["1", "2"])
def test_settings_of_the_shell_change_nothing_that_they_should_not(tmp_path, plain, threads):
    """``PYTHONHASHSEED``, ``SEED`` and ``OMP_NUM_THREADS``: equal bits, with more threads up to rounding."""
    environment = os.environ | {
        "PYTHONHASHSEED": "7", "SEED": "5", "PL_GLOBAL_SEED": "5", "TOKENIZERS_PARALLELISM": "true",
        "OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", SCRIPT.format(folder=str(tmp_path))], env=environment, check=True)
    found = load_file(tmp_path / f"run/checkpoint-{STEPS}/weights.safetensors")
    assert same(found, plain) or threads != "1"
    assert max((found[name] - plain[name]).abs().max() for name in plain) < 1e-5
