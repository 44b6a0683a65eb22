"""The loop: whatever interrupts it, the same command again ends in the same bits, or says what is wrong."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from contracts.cases import checkpoint_bytes, make_run, sections, teacher_for, train_until, weights
from safetensors.torch import load_file, save_file
from training.processes import started, wait_until

from stepdistill.config import read_config
from stepdistill.files.schema import build
from stepdistill.methods.base import Losses
from stepdistill.methods.progressive import Progressive
from stepdistill.training.checkpoint import CheckpointError
from stepdistill.training.config import TrainConfig, resolve
from stepdistill.training.cost import FORWARDS
from stepdistill.training.divergence import DivergenceError, DivergenceGuard
from stepdistill.training.guards import NonFiniteError
from stepdistill.training.optimizers import OptimConfig, step_at
from stepdistill.training.reporting import WAITING
from stepdistill.training.run import Run
from stepdistill.training.trainer import Trainer

METHOD = "progressive"
TESTS = Path(__file__).parents[1]


def make(folder, **train):
    return make_run(folder, METHOD, **{"steps": 6, **train})


def rows(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{key: value for key, value in row.items() if not key.startswith("time")} for row in rows]


def final_weights(run, step=6):
    return load_file(run.folder / f"checkpoint-{step}" / "weights.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing interrupted."""
    run = make(tmp_path_factory.mktemp("straight"), ema=0.9)
    run.train()
    return run


# ------------------------------------------------------------------------------------------------- the loop


def test_a_run_leaves_what_it_promises(straight):
    names = {path.name for path in straight.folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples", "checkpoint-6", "pipeline", "pipeline-4-steps"} <= names
    assert [row["step"] for row in rows(straight)] == [1, 2, 3, 4, 5, 6]
    assert {"stage", "time", "student/loss", "student/grad_norm", "student/lr"} <= rows(straight)[0].keys()
    assert all(0 <= row["time/waiting"] <= 1 for row in rows(straight))
    assert (straight.folder / "samples/step-000006.png").is_file()


def test_a_finished_run_started_again_does_nothing_more(straight):
    before = checkpoint_bytes(straight.folder, 6)
    again = make(straight.folder.parent, ema=0.9)
    again.train()
    assert checkpoint_bytes(again.folder, 6) == before
    assert len(rows(again)) == 6


def test_accumulation_is_a_larger_batch(tmp_path):
    halves = make(tmp_path / "halves", accumulation=2)
    mapping = sections(tmp_path / "whole", teacher_for(METHOD), METHOD, steps=6)
    mapping["data"]["batch_size"] = 8
    whole = Run(resolve(mapping))
    start = weights(whole)
    halves.train()
    whole.train()
    a, b = final_weights(halves), final_weights(whole)
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-5
    moved = weights(whole)
    assert max((moved[name] - start[name]).abs().max() for name in start) > 1e-3


def test_gradient_checkpointing_changes_memory_and_not_the_result(tmp_path, straight):
    run = make(tmp_path, ema=0.9, gradient_checkpointing=True)
    run.train()
    a, b = final_weights(run), final_weights(straight)
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-5


def test_the_average_follows_the_student(tmp_path):
    run = make(tmp_path, ema=0.5)
    trainer = run.trainer()
    run.distiller.stage = run.distiller.stages(6)[0]
    trainer._begin_stage()
    before = run.distiller.bank.state("ema")["conv_in.weight"].clone()
    trainer._step(3, [next(trainer._batches())])
    student, ema = (run.distiller.bank.state(role)["conv_in.weight"] for role in ("student", "ema"))
    keep = min(0.5, 4 / 13)
    torch.testing.assert_close(ema, keep * before + (1 - keep) * student)
    assert run.distiller.result_role == "ema"


@pytest.mark.parametrize(
    ("schedule", "expected"), [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0.1]), ("cosine", [1, 0.5, 0.02447])]
)
def test_learning_rates(schedule, expected):
    optim = OptimConfig(lr=2.0, schedule=schedule)
    assert [optim.lr_at(step, 10) / 2 for step in (0, 5, 9)] == pytest.approx(expected, rel=1e-3)
    warm = OptimConfig(lr=2.0, warmup=3)
    assert [warm.lr_at(step, 10) for step in range(5)] == pytest.approx([0.5, 1, 1.5, 2, 2])


def test_radam_is_torchs_and_makes_no_step_while_a_number_is_not_finite():
    ours, theirs = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = OptimConfig(name="radam", lr=0.1, weight_decay=0.1).make([[ours]])
    other = torch.optim.RAdam([theirs], lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)
    for flag in (0.0, 1.0, 0.0):
        ours.grad, theirs.grad = torch.arange(3.0), torch.arange(3.0)
        step_at(optimizer, 0.1, torch.tensor(flag))
        if not flag:
            other.step()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"accumulation": 0}, {"ema": 1.0}, {"keep": 0}])
def test_impossible_numbers_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        build(TrainConfig, {"steps": 1, "output_dir": "run", **wrong})


# ------------------------------------------------------------------------------------------ non-finite numbers


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_non_finite_number_stops_the_run_and_nothing_is_stepped(tmp_path, monkeypatch, fault):
    loss = Progressive.loss

    def broken(self, batch, draws):
        terms = loss(self, batch, draws).terms
        if self.steps_seen < 2:
            return Losses(terms)
        parameter = self.bank.params("student")[0]
        # sqrt at zero: finite, with an infinite slope
        extra = torch.tensor(torch.nan) if fault == "loss" else (parameter - parameter.detach()).abs().sum().sqrt()
        return Losses({**terms, "extra": extra * terms["loss"].detach()})

    step = Trainer._step

    def count(self, *args):
        self.distiller.steps_seen = self.step
        return step(self, *args)

    monkeypatch.setattr(Progressive, "loss", broken)
    monkeypatch.setattr(Trainer, "_step", count)
    run = make(tmp_path, save_every=1, steps=8)
    term = "extra" if fault == "loss" else "grad_norm"
    with pytest.raises(NonFiniteError, match=rf"step 3, rank 0, turn 'student': '{term}' is not finite"):
        run.train()
    saved = load_file(run.folder / "checkpoint-2/weights.safetensors")
    student = {f"student/{name}": tensor for name, tensor in run.distiller.bank.state("student").items()}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in student.items())
    assert not (run.folder / "checkpoint-3").exists() and len(rows(run)) == 2


# ---------------------------------------------------------------------------------------------- divergence

CRITIC = {"accuracy_real", "accuracy_fake", "logit_real", "logit_fake"}
DIAGNOSTICS = {
    "dmd2": {
        "student": {
            "matching",
            "gan",
            "score_gap_low_noise",
            "score_gap_middle_noise",
            "score_gap_high_noise",
            "fake_score_error_ratio",
            "diversity_ratio",
        },
        "fake": {"denoising", "critic"} | CRITIC,
        "head": set(),
    },
    "ladd": {"student": {"loss", "diversity_ratio"}, "critic": {"loss"} | CRITIC},
}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dmd2", {"fake_update": "alternate", "student_update_interval": 2}),
        ("dmd2", {"student_update_interval": 5}),
        ("ladd", {"student_update_interval": 4}),
    ],
)
def test_every_turns_diagnostics_are_in_every_row_although_the_turns_rest_in_turn(tmp_path, method, options):
    mapping = sections(tmp_path, teacher_for(method), method, steps=20, log_every=10)
    mapping["method"] |= options
    run = Run(resolve(mapping))
    run.train()
    expected = {FORWARDS, WAITING} | {
        f"{turn}/{name}" for turn, names in DIAGNOSTICS[method].items() for name in names | {"grad_norm", "lr"}
    }
    assert [row["step"] for row in rows(run)] == [10, 20]
    assert [{name for name in row if "/" in name} for row in rows(run)] == [expected] * 2
    assert rows(run)[0]["student/grad_norm"] != rows(run)[1]["student/grad_norm"]


def collapsing(folder, monkeypatch, steps=12, save_every=1):
    """A run whose student's spread is gone from step 6 on, and which is told so after four logs."""
    run = make_run(folder, "ladd", steps=steps, save_every=save_every)
    monkeypatch.setattr("stepdistill.methods.ladd.diversity_ratio", lambda x0, real: torch.tensor(0.9 - (run.done > 4)))
    trainer, original = run.trainer(), Trainer._step

    def step(self, *args):
        run.done = self.step
        return original(self, *args)

    monkeypatch.setattr(Trainer, "_step", step)
    trainer.reporter.divergence = DivergenceGuard(patience=3, rows=4)
    monkeypatch.setattr(run, "trainer", lambda: trainer)
    return run


SEEN = (
    r"step 9: the diversity collapsed, since step 6: .*\. "
    r"checkpoint-5 is the last good checkpoint; set aside: .*-7\.div"
)


def checkpoints(run):
    return {path.name for path in run.folder.glob("checkpoint-*")}


def test_a_diverged_run_stops_and_its_newest_checkpoint_is_from_before(tmp_path, monkeypatch):
    run = collapsing(tmp_path, monkeypatch)
    with pytest.raises(DivergenceError, match=SEEN):
        run.train()
    assert checkpoints(run) == {"checkpoint-5", "checkpoint-7.diverged", "checkpoint-8.diverged"}
    assert not (run.folder / "pipeline").exists()
    make_run(tmp_path, "ladd", steps=12, save_every=1).export_checkpoint(tmp_path / "good")
    assert json.loads((tmp_path / "good/stepdistill.json").read_text())["training"]["steps"] == 5


def test_a_resumed_run_diverges_where_it_would_have(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        train_until(collapsing(tmp_path, patch), 8)
    run = collapsing(tmp_path, monkeypatch)
    with pytest.raises(DivergenceError, match=SEEN):
        run.train()
    assert checkpoints(run) == {"checkpoint-5", "checkpoint-7.diverged", "checkpoint-8.diverged"}


def test_where_no_checkpoint_is_good_the_same_command_does_not_start_afresh(tmp_path, monkeypatch):
    run = collapsing(tmp_path, monkeypatch, save_every=2)  # the critic is alone on the first step
    run.trainer().reporter.divergence = DivergenceGuard(patience=1, rows=2)
    monkeypatch.setattr("stepdistill.methods.ladd.diversity_ratio", lambda x0, real: torch.zeros(()))
    with pytest.raises(DivergenceError, match="No checkpoint is as old as step 1; set aside: checkpoint-2.diverged"):
        run.train()
    with pytest.raises(CheckpointError, match=r"no valid checkpoint is left; .*(\n.*)*checkpoint-2\.diverged"):
        make_run(tmp_path, "ladd", steps=12, save_every=2).train()


# ---------------------------------------------------------------------------------------------------- resuming


def test_a_changed_configuration_is_refused_by_key(tmp_path):
    """RELIABILITY row 11."""
    train_until(make(tmp_path, save_every=1), 1)
    mapping = sections(tmp_path, teacher_for(METHOD), METHOD, steps=6, save_every=1)
    mapping["optim"]["student"]["lr"] = 1e-3
    mapping["train"] |= {"seed": 7, "log_every": 2}  # the last may change
    with pytest.raises(ValueError, match=r"optim\.student\.lr: was 0\.005, is 0\.001") as error:
        Run(resolve(mapping)).train()
    assert "train.seed: was 0, is 7" in str(error.value) and "log_every" not in str(error.value)
    assert read_config(tmp_path / "run/config.yaml")["train"]["seed"] == 0


def test_another_teacher_under_the_same_path_is_refused(tmp_path):
    """RELIABILITY row 11: the teacher's hash."""
    train_until(make(tmp_path), 1)
    path = tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"teacher \(weights\): was"):
        make(tmp_path).train()


def test_the_log_forgets_the_steps_that_are_run_again(tmp_path, straight):
    train_until(make(tmp_path, ema=0.9), 2)
    log = tmp_path / "run/metrics.jsonl"
    with log.open("a") as file:  # as if killed after further steps, in the middle of a line
        file.write('{"step": 3, "stage": "lost"}\n{"step": 4, "sta')
    resumed = make(tmp_path, ema=0.9)
    resumed.train()
    assert without_time(rows(resumed)) == without_time(rows(straight))


def test_a_corrupt_newest_checkpoint_costs_an_interval_and_not_the_run(tmp_path, straight):
    train_until(make(tmp_path, ema=0.9, save_every=1), 3)
    path = tmp_path / "run/checkpoint-3/weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    resumed = make(tmp_path, ema=0.9, save_every=1)
    with pytest.warns(UserWarning, match=r"weights\.safetensors.*renamed to checkpoint-3\.corrupt"):
        resumed.train()
    assert checkpoint_bytes(resumed.folder, 6) == checkpoint_bytes(straight.folder, 6)


def test_sigterm_finishes_the_step_saves_and_leaves(tmp_path, monkeypatch, straight):
    step, before = Trainer._step, signal.getsignal(signal.SIGTERM)

    def interrupted(self, *args):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as leaving:
        patch.setattr(Trainer, "_step", interrupted)
        make(tmp_path, ema=0.9).train()
    assert leaving.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert (tmp_path / "run/checkpoint-4").is_dir() and not (tmp_path / "run/pipeline").exists()
    resumed = make(tmp_path, ema=0.9)
    resumed.train()
    assert checkpoint_bytes(resumed.folder, 6) == checkpoint_bytes(straight.folder, 6)


@pytest.fixture
def one_thread():
    """As many as a forked process has, for the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_in_any_step_and_started_again_it_ends_in_the_same_bits(tmp_path, one_thread):
    """RELIABILITY row 1. The step is of the seeded state; where in it, or after it, the kill hits is chance."""
    options = {"steps": 16, "save_every": 3, "ema": 0.9}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    step = random.randrange(4, 10)
    killed_after(step, tmp_path / "killed", options)
    newest = max(
        int(path.name.split("-")[1]) for path in (tmp_path / "killed/run").glob("checkpoint-*") if path.suffix == ""
    )
    assert step - 3 <= newest < 16, f"killed at step {step}"
    resumed = make(tmp_path / "killed", **options)
    resumed.train()
    assert checkpoint_bytes(resumed.folder, 16) == checkpoint_bytes(whole.folder, 16), f"killed at step {step}"
    assert without_time(rows(resumed)) == without_time(rows(whole))


def killed_after(step, folder, options):
    """Start the run in another process, and kill it once it has logged ``step``, wherever it is by then."""
    log = folder / "run/metrics.jsonl"
    with started(folder, lambda: make(folder, **options).train()) as processes:
        wait_until(lambda: processes.ended() or (log.is_file() and log.read_bytes().count(b"\n") >= step), 300)
        assert processes.codes == {}, processes.output(0)[-3000:]
        processes.kill(0)
        assert processes.wait() == [-signal.SIGKILL]


def test_the_last_stage_leaves_only_the_finished_student(tmp_path):
    """With one segment and a sampler of two steps, its student is that of ``pipeline``, not one of a single step."""
    settings = sections(tmp_path, teacher_for("tcd"), "tcd", steps=3)
    settings["method"] = {"name": "tcd", "steps": 2, "segments": [4, 2, 1], "solver_steps": 8}
    run = Run(resolve(settings))
    run.train()
    assert {path.name for path in run.folder.glob("pipeline*")} == {"pipeline", "pipeline-4-steps"}
