"""Two processes, of which one is signalled, stopped, killed, or computes a NaN: all end in time, and say why."""

import os
import re
import signal
import time

import pytest
import torch
from contracts.cases import make_run
from torch.utils.data import DataLoader
from training.processes import started, wait_until

from stepdistill.methods.base import Losses
from stepdistill.methods.progressive import Progressive
from stepdistill.training.checkpoint import latest_checkpoint
from stepdistill.training.heartbeat import Beat, Heartbeat, LostProcessError, naming_a_failed_start, naming_the_lost
from stepdistill.training.trainer import Trainer

STEPS = 2000


@pytest.fixture
def teacher(tmp_path):
    """Teacher and data, which the processes would otherwise write at the same time."""
    make_run(tmp_path, "progressive")
    return tmp_path


def run(folder, **options):
    """What a process does: train for far longer than the test takes."""
    settings = {"steps": STEPS, "log_every": 1, "save_every": 3, "sample_every": STEPS, "timeout": 3.0, **options}
    return lambda: make_run(folder, "progressive", **settings).train()


def rows(folder):
    log = folder / "run/metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def test_a_killed_rank_is_named(teacher):
    """RELIABILITY row 34, FAULTS 14."""
    with started(teacher, run(teacher), world=2) as processes:
        wait_until(lambda: rows(teacher) > 4)
        began = time.monotonic()
        processes.kill(1)
        assert processes.wait(30) == [2, -9]
        assert time.monotonic() - began < 15
    assert "rank 1 did not answer" in processes.output(0)
    assert latest_checkpoint(teacher / "run").step >= 3


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.product), 1])
def test_a_stopped_rank_is_named_after_the_timeout(teacher, rank):
    """RELIABILITY row 34, FAULTS 14: a stopped rank was waited for up to the backend's half hour."""
    with started(teacher, run(teacher), world=2) as processes:
        wait_until(lambda: rows(teacher) > 4)
        began = time.monotonic()
        processes.kill(rank, signal.SIGSTOP)
        wait_until(lambda: processes.ended() or 1 - rank in processes.codes, 30)
        assert 2 < time.monotonic() - began < 20
        processes.kill(rank)
        processes.wait(10)
    assert processes.codes == {rank: -9, 1 - rank: 2}
    assert f"rank {rank} did not answer for 3 s (train.timeout)" in processes.output(1 - rank)
    assert latest_checkpoint(teacher / "run").step >= 3


@pytest.mark.product
def test_a_hanging_rank_is_named(teacher, monkeypatch):
    """Alive, but its data does not come."""
    step = Trainer._train_on

    def hang(self, step_in_stage, batches):
        load = self.dataset.load
        if self.step == 3 and self.accelerator.process_index == 1:
            self.dataset.load = lambda indices: time.sleep(100) or load(indices)
        step(self, step_in_stage, batches)

    monkeypatch.setattr(Trainer, "_train_on", hang)
    with started(teacher, run(teacher), world=2) as processes:
        wait_until(lambda: processes.ended() or 0 in processes.codes, 60)
        processes.kill(1)
    assert processes.codes[0] == 2 and "rank 1 did not answer for 3 s" in processes.output(0)


def steps_of(alive):
    """The step that a heartbeat names; 0 of a file that is being written."""
    words = alive.read_bytes().split()
    return int(words[2]) if len(words) > 2 else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.product)])
def test_a_signal_to_one_rank_stops_both_with_one_checkpoint(teacher, monkeypatch, number):
    """RELIABILITY row 3, FAULTS 14: agreed on within a second or step, although no row of the log is due for long."""
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, *args: time.sleep(0.05) or step(self, *args))
    with started(teacher, run(teacher, log_every=1000, save_every=1000, timeout=60), world=2) as processes:
        alive = teacher / "run/.alive/rank-1"
        wait_until(lambda: alive.is_file() and steps_of(alive) > 4)
        processes.kill(1, number)
        assert processes.wait(20) == [128 + number] * 2
    assert [path.name for path in (teacher / "run").glob("checkpoint-*")] == [
        f"checkpoint-{latest_checkpoint(teacher / 'run').step}"
    ]
    assert not (teacher / "run/.alive").exists()


def test_a_nan_on_one_rank_stops_both_before_either_has_moved(teacher, monkeypatch):
    """RELIABILITY row 14: rank, step, term and samples of the rank that had it; none of the others'."""
    loss, step = Progressive.loss, Trainer._step

    def nan(self, batch, draws):
        terms = loss(self, batch, draws).terms
        bad = self.now == 3 and int(os.environ["RANK"]) == 1
        return Losses({name: value * (torch.nan if bad else 1) for name, value in terms.items()})

    def count(self, *args):
        self.distiller.now = self.step
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_step", count)
    monkeypatch.setattr(Progressive, "loss", nan)
    with started(teacher, run(teacher, steps=6, save_every=1, timeout=60), world=2) as processes:
        assert processes.wait() == [2, 2]
    for rank in (0, 1):
        assert "step 4, rank 1, turn 'student': 'loss' is not finite (samples " in processes.output(rank)
        assert "rank 0" not in processes.output(rank)
    assert latest_checkpoint(teacher / "run").step == 3


def test_a_killed_data_worker_is_a_sentence(teacher, monkeypatch):
    """RELIABILITY row 34."""
    iterate = DataLoader._get_iterator

    def note(self):
        iterator = iterate(self)
        (teacher / "worker").write_text(str(iterator._workers[0].pid))
        return iterator

    monkeypatch.setattr(DataLoader, "_get_iterator", note)

    def train():
        trained = make_run(teacher, "progressive", steps=STEPS, save_every=3, log_every=1, sample_every=STEPS)
        object.__setattr__(trained.config.data, "num_workers", 1)
        trained.train()

    with started(teacher, train) as processes:
        wait_until(lambda: rows(teacher) > 4)
        os.kill(int((teacher / "worker").read_text()), signal.SIGKILL)
        assert processes.wait(30) == [2], processes.output(0)[-3000:]
    assert "sentence: rank 0: a data worker was killed or has ended" in processes.output(0)
    assert latest_checkpoint(teacher / "run").step >= 3


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"), True),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), True),
        (EOFError(), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), False),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_only_what_a_lost_process_leaves_behind_is_called_so(tmp_path, error, is_lost):
    heart = Heartbeat(tmp_path, rank=0, world=1, timeout=1)
    with pytest.raises(LostProcessError if is_lost else RuntimeError) as caught, naming_the_lost(heart):
        raise error
    assert is_lost != (caught.value is error) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[gloo] Connection closed by peer", "Socket Timeout: timed out after 5000ms"])
def test_processes_that_do_not_find_each_other_say_so(text):
    said = f"did not find each other, or one ended \\({re.escape(text)}\\)"
    with pytest.raises(LostProcessError, match=said), naming_a_failed_start():
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="^shapes$"), naming_a_failed_start():
        raise RuntimeError("shapes")


def test_who_is_silent_depends_on_changes_alone(tmp_path):
    heart = Heartbeat(tmp_path, rank=0, world=3, timeout=10)
    heart.position = 5
    now = time.monotonic()

    def beats(**of):
        heart._beats = {rank: Beat(b"", place, now - alive, now - moved) for rank, place, alive, moved in of.values()}
        return heart.silent()

    assert beats(a=(1, 5, 1, 1), b=(2, 5, 1, 1)) == []
    assert beats(a=(1, 5, 11, 11), b=(2, 5, 1, 1)) == [1]  # stopped
    assert beats(a=(1, 4, 1, 11), b=(2, 5, 1, 11)) == [1]  # alive, and all others wait for it
    assert beats(a=(1, 5, 1, 11), b=(2, 5, 1, 11)) == []  # all at one place: a long measurement
    assert beats(a=(1, 6, 1, 11), b=(2, 6, 1, 11)) == []  # this one is behind, which the others say
    assert beats() == []  # a single host without the folder


def test_a_single_process_leaves_no_heartbeat(tmp_path):
    with Heartbeat(tmp_path, rank=0, world=1, timeout=1) as heart:
        assert heart.lost() == []
    assert list(tmp_path.iterdir()) == []
