"""Runs that are long or shared: signals, numbers that are not finite, disks that fill up, clocks that jump."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from contracts.cases import checkpoint_bytes, make_run, make_trainer, train_until, weights
from safetensors.torch import load_file, save_file
from training.processes import started, wait_until

from stepdistill.cli import main
from stepdistill.config import to_yaml
from stepdistill.files.writing import check_writable
from stepdistill.methods.base import Losses
from stepdistill.methods.progressive import Progressive
from stepdistill.training import checkpoint, guards, metrics_log
from stepdistill.training.checkpoint import CheckpointError, latest_checkpoint, save_checkpoint
from stepdistill.training.guards import NonFiniteError
from stepdistill.training.interruption import Agreement, StopSignal, steps_between
from stepdistill.training.metrics_log import MetricsLog
from stepdistill.training.run_lock import RunLock
from stepdistill.training.selection import FILE, BestStudent
from stepdistill.training.trainer import Trainer

METHOD = "progressive"


def make(folder, **train):
    return make_run(folder, METHOD, **{"steps": 6, "save_every": 2, **train})


def rows(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing interrupted."""
    run = make(tmp_path_factory.mktemp("straight"), ema=0.9)
    run.train()
    return run


@pytest.fixture
def broken(monkeypatch):
    """Make the loss NaN on some steps (from 0)."""
    loss, step, on = Progressive.loss, Trainer._step, set()

    def count(self, *args):
        self.distiller.now = self.step
        return step(self, *args)

    def nan(self, batch, draws):
        terms = loss(self, batch, draws).terms
        return Losses({name: value * (torch.nan if self.now in on else 1) for name, value in terms.items()})

    monkeypatch.setattr(Trainer, "_step", count)
    monkeypatch.setattr(Progressive, "loss", nan)
    return on


def as_on_a_gpu(run, monkeypatch):
    """The run's trainer, which reads the flag only when it must, as off the CPU."""
    trainer = run.trainer()
    report = Trainer._report

    def lazily(self, *args):
        self.device = torch.device("meta")  # only its type is looked at
        report(self, *args)
        self.device = torch.device("cpu")

    monkeypatch.setattr(Trainer, "_report", lazily)
    monkeypatch.setattr(run, "trainer", lambda: trainer)
    return trainer


# ------------------------------------------------------------------------------------------ not finite: raise


@pytest.mark.parametrize("step", [1, 2])
def test_no_checkpoint_is_saved_after_a_nan_although_no_row_is_due(tmp_path, monkeypatch, broken, step):
    """FAULTS 7: the flag was read every ``log_every`` steps only, and steps 2 and 4 were saved with it raised."""
    broken.add(step)
    run = make(tmp_path, log_every=6)
    as_on_a_gpu(run, monkeypatch)
    with pytest.raises(NonFiniteError, match=f"step {step + 1}, rank 0, turn 'student': 'loss' is not finite"):
        run.train()
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-2"][: step - 1]


def test_no_stage_is_exported_after_a_nan(tmp_path, monkeypatch, broken):
    broken.add(1)  # the last step of the first stage
    run = make(tmp_path, log_every=6, save_every=6)
    as_on_a_gpu(run, monkeypatch)
    with pytest.raises(NonFiniteError, match="step 2"):
        run.train()
    assert not list(run.folder.glob("pipeline*"))


def test_the_message_names_the_samples_of_the_step(tmp_path, broken):
    """RELIABILITY row 14: rank, step, samples and term; for one process; for two see ``test_lost_processes.py``."""
    broken.add(1)
    run = make(tmp_path)
    seen = []
    load = run.dataset.load
    run.dataset.load = lambda indices: seen.append(indices) or load(indices)
    with pytest.raises(NonFiniteError) as error:
        run.train()
    names = ", ".join(map(run.dataset.name, seen[1]))
    assert f"step 2, rank 0, turn 'student': 'loss' is not finite (samples {names})" in str(error.value)


def test_many_samples_are_named_shortly():
    guard = guards.FiniteGuard(torch.device("cpu"), lambda index: f"image-{index}")
    guard.note_samples(0, range(10))
    guard.check(0, "student", {"student/loss": torch.tensor(torch.nan)})
    with pytest.raises(NonFiniteError, match=r"image-0, .*image-7 and those of index 8, 9\)"):
        guard.raise_if_tripped()


def test_a_nan_of_the_teacher_is_called_so(tmp_path):
    """RELIABILITY row 16: in the teacher's output."""
    run = make(tmp_path)
    call = run.distiller.teacher.family.call
    networks = run.distiller.bank

    def nan(network, *args, **kwargs):
        output = call(network, *args, **kwargs)
        return output * torch.nan if network is networks.networks["teacher"] else output

    run.distiller.teacher.family.call = nan
    with pytest.raises(NonFiniteError, match="step 1, rank 0, turn 'student': the teacher's output is not finite"):
        run.train()


def test_a_nan_of_the_data_is_called_so(tmp_path):
    run = make(tmp_path)
    load = run.dataset.load

    def nan(indices):
        batch = load(indices)
        batch.images[0, 0, 0, 0] = torch.nan
        return batch

    run.dataset.load = nan
    with pytest.raises(NonFiniteError, match="turn 'student': the data is not finite"):
        run.train()


def test_an_update_that_raises_stops_the_run(tmp_path, monkeypatch):
    """RELIABILITY row 17: no turn's error is swallowed."""
    run = make_run(tmp_path, "dmd2")
    forward = type(run.distiller).forward

    def fail(self, turn, *args):
        if turn == "fake":
            raise ValueError("fake: out of order")
        return forward(self, turn, *args)

    monkeypatch.setattr(type(run.distiller), "forward", fail)
    with pytest.raises(ValueError, match="fake: out of order"):
        run.train()


# ------------------------------------------------------------------------------------------- not finite: skip


def state_of(trainer):
    optimizers = {}
    for name, optimizer in trainer.optimizers.items():
        for place, state in enumerate(optimizer.state.values()):
            for key, value in state.items():
                optimizers[f"{name}/{place}/{key}"] = value.clone()
        optimizers[f"{name}/lr"] = torch.tensor(optimizer.param_groups[0]["lr"])
    return optimizers


def test_a_skipped_step_leaves_everything_as_it_was(tmp_path, broken):
    """RELIABILITY row 15: weights, averages, optimisers and rates to the bit; and the next step is made."""
    run = make(tmp_path, nan_policy="skip", ema=0.9)
    trainer = make_trainer(run)
    batches = trainer._batches()
    trainer._train_on(0, [next(batches)])
    before, optimizers = weights(run), state_of(trainer)
    broken.add(1)
    trainer._train_on(1, [next(batches)])
    after = state_of(trainer)
    assert trainer.step == 2 and trainer.nan.total == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())
    assert optimizers.keys() == after.keys() and all(torch.equal(after[key], optimizers[key]) for key in after)
    trainer._train_on(2, [next(batches)])
    assert not all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())


def test_skipped_steps_are_counted_in_the_log_and_remembered(tmp_path, broken):
    broken.update({1, 3})
    run = make(tmp_path, nan_policy="skip")
    run.train()
    assert [row["skipped_steps"] for row in rows(run)] == [0, 1, 1, 2, 2, 2]
    assert all(torch.isfinite(torch.tensor(row["student/loss"])) for row in rows(run) if "student/loss" in row)
    assert latest_checkpoint(run.folder).state["skipped"] == [1, 3]


def test_too_many_skipped_steps_end_the_run(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(guards, "LIMIT", 2)
    broken.update({1, 2, 4})
    with pytest.raises(NonFiniteError, match=r"3 of the last 100 steps were skipped, and at most 2 may be"):
        make(tmp_path, nan_policy="skip").train()


def test_the_budget_is_one_of_the_last_steps():
    guard = guards.FiniteGuard(torch.device("cpu"))
    policy = guards.SkipOnNan(guard)
    for step in range(0, 1000, 10):  # ten in a hundred
        guard.check(step, "student", {"student/loss": torch.tensor(torch.nan)})
        with pytest.raises(guards.SkippedStepError):
            policy.before_move(step)
    assert policy.total == 100
    guard.check(995, "student", {"student/loss": torch.tensor(torch.nan)})
    with pytest.raises(NonFiniteError, match="11 of the last 100 steps were skipped"):
        policy.before_move(995)


def test_a_run_that_ended_at_a_nan_goes_on_with_skip(tmp_path, broken):
    broken.add(3)
    with pytest.raises(NonFiniteError):
        make(tmp_path).train()
    make(tmp_path, nan_policy="skip").train()
    assert (tmp_path / "run/pipeline").is_dir()


# ---------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_every_signal_saves_and_leaves_with_its_code(tmp_path, monkeypatch, straight, number, code):
    """FAULTS 14, REPORTS 25: SIGINT was a traceback, and SIGUSR1 killed the run, both without a checkpoint."""
    step, before = Trainer._step, signal.getsignal(number)

    def interrupted(self, *args):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as leaving:
        patch.setattr(Trainer, "_step", interrupted)
        make(tmp_path, ema=0.9, save_every=6).train()
    assert leaving.value.code == code and signal.getsignal(number) == before
    assert (tmp_path / "run/checkpoint-3").is_dir()
    resumed = make(tmp_path, ema=0.9, save_every=6)
    resumed.train()
    assert checkpoint_bytes(resumed.folder, 6) == checkpoint_bytes(straight.folder, 6)


def stuck_in_the_save(folder):
    """Save once; then save again at a signal, but never come back from it."""

    def wait(*args):
        (folder / "saving").touch()
        threading.Event().wait()  # no instruction of the main thread ends here

    save_checkpoint(folder / "run", 1, {"student": {"w": torch.ones(3)}}, {}, keep=2)
    with StopSignal() as stop:
        (folder / "ready").touch()
        while not stop.received:
            time.sleep(0.01)
        checkpoint.save_file = wait
        save_checkpoint(folder / "run", 2, {"student": {"w": torch.ones(3)}}, {}, keep=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_in_the_save_ends_at_once_and_the_earlier_checkpoint_is_whole(tmp_path, number):
    """RELIABILITY row 4."""
    with started(tmp_path, lambda: stuck_in_the_save(tmp_path)) as processes:
        wait_until((tmp_path / "ready").exists)
        processes.kill(0, number)
        wait_until((tmp_path / "saving").exists)
        processes.kill(0, number)
        assert processes.wait(10) == [128 + number]
    assert latest_checkpoint(tmp_path / "run").step == 1


def test_a_launchers_echo_is_no_second_signal(monkeypatch):
    left = []
    monkeypatch.setattr("stepdistill.training.interruption.leave_now", left.append)
    with StopSignal(echo=0.3) as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        assert stop.received == signal.SIGINT and left == []
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not left and time.monotonic() < deadline:
            time.sleep(0.01)
    assert left == [143]


class Two:
    """An accelerator of two processes, the other of which reports what it is told to."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self):
        self.other, self.asked = [0.0, 0.0], 0

    def gather(self, own):
        self.asked += 1
        return torch.cat([own, torch.tensor([self.other])])


def test_processes_agree_on_every_step_that_costs_a_second_and_else_at_the_log_interval(monkeypatch):
    """RELIABILITY row 3, FAULTS 14: a signal to one rank was noticed every ``log_every`` steps, however long."""
    assert [steps_between(seconds, 50) for seconds in (100.0, 1.0, 0.1, 0.02, 1e-9)] == [1, 1, 10, 50, 50]
    for seconds, expected in ((2.0, 8), (1e-6, 1)):
        two, now = Two(), [0.0]
        monkeypatch.setattr("stepdistill.training.interruption.time.monotonic", lambda now=now: now[0])
        agreement = Agreement(two, log_every=10)
        for step in range(1, 9):
            now[0] += seconds
            assert agreement.on(step, 0) == 0
        assert two.asked == expected + (seconds < 1)  # the first answer tells how long a step takes
    two.other = [float(signal.SIGUSR1), 0.0]
    assert [agreement.on(step, 0) for step in range(9, 13)].count(signal.SIGUSR1) == 1


def test_data_workers_do_not_get_the_terminals_signals(tmp_path):
    """A Ctrl-C goes to the whole group: workers that it ended would end the run before it has saved."""
    run = make(tmp_path)
    mine = os.getpgid(0)
    run.dataset.load = lambda indices, load=run.dataset.load: (
        load(indices) if os.getpgid(0) != mine else (_ for _ in ()).throw(ValueError("in the run's group"))
    )
    from stepdistill.data.loader import loader

    assert len(next(loader(run.dataset, batch_size=2, seed=0, num_workers=1)).indices) == 2


# --------------------------------------------------------------------------------------------- the log's rows


def test_a_long_log_is_taken_up_by_its_end(tmp_path, monkeypatch):
    """FAULTS 11: a log of 99 MB took 31 s. Bytes are counted, which are the same on every machine."""
    log = MetricsLog(tmp_path)
    line = json.dumps({"step": 1, "stage": "train", "junk": "x" * 900}) + "\n"
    log.path.write_text(line * 5000 + "".join(json.dumps({"step": step}) + "\n" for step in range(2, 40)))
    before, read = log.path.read_bytes(), []
    path_open = Path.open

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def seek(self, *where):
            return self.file.seek(*where)

        def read(self, size):
            read.append(size)
            return self.file.read(size)

    monkeypatch.setattr(Path, "open", lambda path, *args, **options: Counting(path_open(path, *args, **options)))
    log.cut_after(20)
    monkeypatch.undo()
    assert sum(read) <= metrics_log.BLOCK < len(before) / 50
    assert before.startswith(log.path.read_bytes()) and log.path.read_bytes().endswith(b'{"step": 20}\n')


def test_a_kill_while_the_log_is_cut_leaves_the_old_one(tmp_path, monkeypatch):
    """FAULTS 11: it was rewritten in place."""
    log = MetricsLog(tmp_path)
    for step in range(1, 9):
        log.append(step, "train", {})
    before = log.path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(metrics_log.os, "truncate", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        log.cut_after(3)
    assert log.path.read_bytes() == before
    log.cut_after(3)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("junk", ["junk", "[]", '{"step": "7"}', "{}", '{"step": true}', "[" * 5000, "\udcff", ""])
def test_a_junk_line_names_file_and_line_and_blocks_nothing(tmp_path, junk):
    log = MetricsLog(tmp_path)
    lines = ['{"step": 1}', '{"step": 2}', junk, '{"step": 3}', '{"step": 4}']
    log.path.write_bytes("".join(line + "\n" for line in lines).encode(errors="surrogateescape"))
    log.cut_after(3)  # is not even read
    assert log.path.read_bytes().count(b"\n") == 4
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: line 3: .*; skipped"):
        log.cut_after(2)
    assert log.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_foreign_file_in_the_logs_place_is_left_alone(tmp_path):
    log = MetricsLog(tmp_path)
    log.path.write_text("first\nsecond\n")
    with pytest.warns(UserWarning, match="line 1"):
        log.cut_after(5)
    assert log.path.read_text() == "first\nsecond\n"


def test_samples_of_later_steps_are_forgotten_too(tmp_path):
    """Found by a kill: the export of a stage that ended before showed the samples of the next step."""
    train_until(make(tmp_path, sample_every=1), 3)
    samples = tmp_path / "run/samples"
    for name in ("step-000004.png", "step-mine.png", "notes.txt"):
        (samples / name).touch()
    trainer = make(tmp_path).trainer()
    trainer.restore()
    trainer.reporter.resume(trainer.step)
    kept = {path.name for path in samples.iterdir()}
    assert kept == {"step-000001.png", "step-000002.png", "step-000003.png", "step-mine.png", "notes.txt"}


@pytest.mark.parametrize("long", [10, 300_000])
def test_lines_of_any_length_are_read_backwards(tmp_path, long):
    path = tmp_path / "log"
    lines = [bytes([65 + i]) * (long if i % 3 else 7) + b"\n" for i in range(9)] + [b"cut\rshort"]
    path.write_bytes(b"".join(lines))
    found = list(metrics_log._lines_from_the_end(path))
    assert [line for _, line in reversed(found)] == lines
    assert all(path.read_bytes()[begin:].startswith(line) for begin, line in found)


# ------------------------------------------------------------------------------------------ disks and folders


def full(*args, **options):
    raise OSError(28, "No space left on device")


full.dumps = full


def test_an_error_while_an_old_checkpoint_is_removed_is_a_warning(tmp_path, monkeypatch):
    """FAULTS 12: it killed the run although the new checkpoint was safe."""
    run = make(tmp_path, save_every=1, keep=1, steps=3)
    rename = os.rename
    monkeypatch.setattr(
        "stepdistill.training.checkpoint.os.rename",
        lambda a, b: full() if "tmp" in Path(b).name else rename(a, b),
    )
    with pytest.warns(UserWarning, match="an old checkpoint cannot be removed: .*No space left"):
        run.train()
    assert latest_checkpoint(run.folder).step == 3
    monkeypatch.undo()
    save_checkpoint(run.folder, 4, {}, {}, keep=1)
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-4"]


OUTPUTS = {
    "train": lambda path, config: ["train", "--config", config, f"train.output_dir={path}"],
    "export": lambda path, config: ["export", "--config", config, "--output", path],
    "generate": lambda path, config: ["generate", "--pipeline", "pipeline", "--output", f"{path}/grid.png"],
    "evaluate": lambda path, config: ["evaluate", "--pipeline", "pipeline", "--output", f"{path}/result.json"],
}


@pytest.mark.parametrize("command", OUTPUTS)
@pytest.mark.parametrize("fault", ["full", "read-only", "file"])
def test_an_unwritable_output_is_found_before_models_are_loaded(tmp_path, monkeypatch, capsys, command, fault):
    """RELIABILITY rows 5 and 6, FAULTS 15: these were tracebacks after the models were loaded."""
    mapping = {
        "teacher": {"path": "no-such-teacher"}, "method": {"name": METHOD}, "data": {"name": "images", "path": "x.npz"},
        "train": {"steps": 1, "output_dir": "run"},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(mapping))
    (tmp_path / "file").write_text("")
    reasons = {"full": (28, "No space left on device"), "read-only": (30, "Read-only file system")}
    if fault in reasons:

        def fail(**options):
            raise OSError(*reasons[fault])

        monkeypatch.setattr("stepdistill.files.writing.tempfile.TemporaryFile", fail)
    path = str(tmp_path / ("file/run" if fault == "file" else "run"))
    with pytest.raises(SystemExit) as leaving:
        main(OUTPUTS[command](path, str(tmp_path / "config.yaml")))
    message = capsys.readouterr().err
    assert leaving.value.code == 2 and "cannot be written: " in message and "no-such" not in message
    assert reasons.get(fault, (0, "file is a file"))[1] in message and message.count("\n") == 1


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "new/folder")
    (tmp_path / "result.json").write_text("old")
    check_writable(tmp_path / "result.json")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (tmp_path / "result.json").read_text() == "old"


@pytest.mark.parametrize(
    ("place", "file"),
    [
        ("stepdistill.training.run_lock._try_lock", "run: cannot be used as output_dir"),
        ("stepdistill.training.run.atomic_write", "config.yaml: cannot be written"),
        ("stepdistill.training.metrics_log.json", "metrics.jsonl: cannot be written"),
        ("stepdistill.training.reporting.save_grid", "samples/step-000006.png: cannot be written"),
    ],
)
def test_a_disk_that_is_full_outside_checkpoints_names_the_file(tmp_path, monkeypatch, place, file):
    """RELIABILITY row 5: lock, configuration, log and samples."""
    run = make(tmp_path)
    run.trainer()
    monkeypatch.setattr(place, full)
    with pytest.raises(ValueError, match=f"{file}: .*No space left on device"):
        run.train()


# ---------------------------------------------------------------------------------------------------- the lock


def test_a_lock_of_another_host_says_how_to_remove_it(tmp_path):
    (tmp_path / "a run").mkdir()
    lock = tmp_path / "a run/.lock"
    lock.write_text("pid 1 on elsewhere")
    with pytest.raises(CheckpointError, match="remove its lock, because") as error:
        RunLock(tmp_path / "a run").__enter__()
    command = str(error.value).partition(": rm ")[2]
    subprocess.run(f"rm {command}", shell=True, check=True)
    with RunLock(tmp_path / "a run"):
        assert lock.read_text() == f"pid {os.getpid()} on {socket.gethostname()}"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_lock_that_is_a_link_empties_no_other_file(tmp_path, link):
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "run").mkdir()
    link(tmp_path / "thesis", tmp_path / "run/.lock")
    with pytest.raises(CheckpointError, match="cannot be used as output_dir|expected the lock of a run"):
        RunLock(tmp_path / "run").__enter__()
    assert (tmp_path / "thesis").read_text() == "years of work"


def test_a_clock_that_jumps_and_another_host_name_change_nothing(tmp_path, monkeypatch, straight):
    """RELIABILITY row 35."""
    moments = iter(range(10**9, 0, -(10**6)))
    step = Trainer._step

    def elsewhere(self, *args):
        if self.step == 2:
            monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
        return step(self, *args)

    monkeypatch.setattr(time, "time", lambda: float(next(moments)))
    monkeypatch.setattr(Trainer, "_step", elsewhere)
    run = make(tmp_path, ema=0.9)
    run.train()
    assert checkpoint_bytes(run.folder, 6) == checkpoint_bytes(straight.folder, 6)
    make(tmp_path, ema=0.9).train()  # the lock was left empty


# ------------------------------------------------------------------------------------------ the best student


def keep_one(folder):
    best = BestStudent(folder)
    best.offer("train", 1, {"fd": 1.0}, {"a": torch.ones(2, 3)})
    return best, folder / FILE


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:-1], lambda c: c[:20], lambda c: c + b"x", flipped])
def test_a_damaged_best_student_is_a_sentence(tmp_path, damage):
    best, path = keep_one(tmp_path)
    best.check()
    path.write_bytes(damage(path.read_bytes()))
    for call in (best.check, lambda: best.record("train"), lambda: best.restore({"a": torch.ones(2, 3)})):
        with pytest.raises(ValueError, match=r"best\.safetensors: .*; remove it, and"):
            call()


@pytest.mark.parametrize("record", [None, "junk", "[]", "{}", '{"stage": "train"}'])
def test_a_best_student_without_a_record_is_a_sentence(tmp_path, record):
    best, path = keep_one(tmp_path)
    save_file({"a": torch.ones(2, 3)}, path, metadata=None if record is None else {"record": record})
    with pytest.raises(ValueError, match=r"best\.safetensors"):
        best.record("train")


def test_a_best_student_of_an_older_version_and_one_of_another_network(tmp_path):
    best, path = keep_one(tmp_path)
    old = {"stage": "train", "step": 1, "value": 1.0, "metric": "fd"}
    save_file(load_file(path), path, metadata={"record": json.dumps(old)})  # without a hash
    assert best.record("train") == old
    for other in ({"b": torch.ones(1)}, {"a": torch.ones(3)}):
        with pytest.raises(ValueError, match="is missing or of another shape"):
            best.restore(other)
