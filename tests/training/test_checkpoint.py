"""Checkpoints: what is saved comes back bit for bit, and every fault that can be staged is survived or named."""

import json
import os
import resource
import shutil
import signal
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from contracts.cases import make_run, train_until
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training.processes import started, wait_until

from stepdistill.methods.base import Stage
from stepdistill.training import checkpoint
from stepdistill.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from stepdistill.training.optimizer_state import make_state, optimizer_tensors, restore_optimizer
from stepdistill.training.optimizers import OptimConfig
from stepdistill.training.run_lock import RunLock
from stepdistill.training.run_state import SavedState

FILES = ["fake.safetensors", "manifest.json", "state.json", "student.safetensors"]


def groups(step: int) -> dict[str, dict[str, Tensor]]:
    return {name: {"weight": torch.full((5,), float(step)), "bias": torch.arange(3)} for name in ("student", "fake")}


def save(folder: Path, step: int, keep: int = 9, spare: int | None = None) -> Path:
    return save_checkpoint(folder, step, groups(step), {"stage": "only"}, keep=keep, spare=spare)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# ------------------------------------------------------------------------------------------- round trips


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    whole = torch.arange(-3, 9).reshape(3, 4)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {str(dtype): (whole / 7).to(dtype) for dtype in dtypes}
    tensors["special"] = torch.tensor([torch.inf, -torch.inf, -0.0, 1e-45])
    state = {"stage": 2, "name": "é", "turns": {"fake": 7}, "rate": 0.1, "nothing": None}
    save_checkpoint(tmp_path / "run", 3, {"student": tensors, "nothing": {}}, state, keep=1)
    loaded = latest_checkpoint(tmp_path / "run")
    assert (loaded.step, loaded.state, loaded.path) == (3, state, tmp_path / "run" / "checkpoint-3")
    read = loaded.tensors("student")
    assert read.keys() == tensors.keys() and all(identical(read[key], tensors[key]) for key in tensors)
    assert loaded.tensors("nothing") == {}


def test_shared_strided_and_empty_tensors_can_be_saved(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "tied": base,
        "part": base[1:],
        "transposed": base.t(),
        "expanded": torch.ones(1).expand(4),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.ones(2)),
        "empty": torch.empty(0),
        "empty_too": torch.empty(0, 3),
        "scalar": torch.tensor(5),
    }
    read = load_checkpoint(save_checkpoint(tmp_path, 1, {"all": tensors}, {}, keep=1)).tensors("all")
    assert read.keys() == tensors.keys() and all(identical(read[key], tensors[key]) for key in tensors)


def test_the_same_content_makes_the_same_files(tmp_path):
    first, second = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)


def test_an_unknown_group_is_named_with_the_nearest(tmp_path):
    with pytest.raises(CheckpointError, match="studnet.safetensors: no such group; did you mean 'student'"):
        load_checkpoint(save(tmp_path, 1)).tensors("studnet")


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    (tmp_path / "checkpoint-5.tmp-0a1b").mkdir()  # killed inside the first save
    (tmp_path / "checkpoint-best").mkdir()
    assert latest_checkpoint(tmp_path) is None


# ---------------------------------------------------------------------------------------------- rotation


def test_rotation_spares_the_newest_good_one(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=1, spare=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-2", "checkpoint-4"]


def test_rotation_keeps_the_newest_by_number(tmp_path):
    (tmp_path / "checkpoint-5.tmp-0a1b").mkdir()
    (tmp_path / "checkpoint-7.corrupt").mkdir()
    for step in (8, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-7.corrupt"]
    assert latest_checkpoint(tmp_path).step == 100


@pytest.mark.parametrize("step", [5, 10])
def test_a_second_history_in_one_folder_is_refused(tmp_path, step):
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match=f"checkpoint-{step}: checkpoint-10 is there already"):
        save(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-10"]


def test_keep_must_leave_one(tmp_path):
    with pytest.raises(CheckpointError, match="keep: expected at least 1, got 0"):
        save(tmp_path, 1, keep=0)
    assert names(tmp_path) == []


# ----------------------------------------------------------------------------- faults while it is written


class FailAt:
    """Wraps a function and does something else at its k-th call."""

    def __init__(self, function, k, fault):
        self.function, self.left, self.fault = function, k, fault

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.fault()
        return self.function(*args, **kwargs)


def disk_full():
    raise OSError(28, "No space left on device")


def interrupt():
    raise KeyboardInterrupt


# With two groups the flushes are of two files, state.json, manifest.json, the folder; after the rename, of its parent.
POINTS = [("save_file", 1), ("save_file", 2), ("sha256_of", 1), *(("_fsync", k) for k in range(1, 6)), ("os.rename", 1)]


@pytest.mark.parametrize(("name", "k"), POINTS)
@pytest.mark.parametrize("fault", [disk_full, interrupt])
def test_a_failed_save_leaves_everything_as_it_was(tmp_path, monkeypatch, name, k, fault):
    """RELIABILITY row 5: inside a checkpoint."""
    save(tmp_path, 10, keep=1)
    original = os.rename if name == "os.rename" else getattr(checkpoint, name)
    with monkeypatch.context() as patch:
        patch.setattr(f"stepdistill.training.checkpoint.{name}", FailAt(original, k, fault))
        with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
            save(tmp_path, 20, keep=1)
    if fault is disk_full:
        assert "checkpoint-20: cannot be written (0.0 MiB needed)" in str(caught.value)
        assert "No space left" in str(caught.value)
    assert names(tmp_path) == ["checkpoint-10"]
    assert identical(latest_checkpoint(tmp_path).tensors("student")["weight"], groups(10)["student"]["weight"])
    save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["checkpoint-20"]


def test_a_short_write_by_the_kernel_is_an_error_with_the_path(tmp_path):
    save(tmp_path, 10)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-20: cannot be written \(4\.0 MiB needed\)"):
            save_checkpoint(tmp_path, 20, {"student": {"weight": torch.zeros(2**20)}}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["checkpoint-10"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kill_9_at_every_point_of_a_save(tmp_path, monkeypatch):
    """RELIABILITY row 2: a child kills itself at the k-th flush, rename or removal, until a save gets through."""
    survived = []
    for k in range(1, 20):
        folder = tmp_path / str(k)
        save(folder, 10)
        status = _save_in_a_child_killed_at(k, folder)
        loaded = latest_checkpoint(folder)
        survived.append(loaded.step)
        weight = groups(loaded.step)["student"]["weight"]
        assert all(identical(loaded.tensors(group)["weight"], weight) for group in ("student", "fake"))
        save(folder, 30, keep=1)  # the next save sweeps what the kill left
        assert names(folder) == ["checkpoint-30"]
        if status == 0:
            break
    # Five flushes and a rename make it a checkpoint; a flush of the parent, a rename and a removal to prune follow.
    assert survived == [10] * 6 + [20] * 4


def _save_in_a_child_killed_at(k: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        killer = FailAt(lambda: None, k, lambda: os.kill(os.getpid(), signal.SIGKILL))
        fsync, rename, rmtree = os.fsync, os.rename, shutil.rmtree
        os.fsync = lambda descriptor: (killer(), fsync(descriptor))
        os.rename = lambda *paths: (killer(), rename(*paths))
        # The clean-up after a failure removes with ignore_errors, and finds nothing here.
        shutil.rmtree = lambda path, **ignore: (ignore or killer(), rmtree(path, **ignore))
        save(folder, 20, keep=1)
        os._exit(0)
    finally:
        os._exit(1)  # the child must never go on as a second pytest


def test_state_must_be_json(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, groups(1), {"tensor": torch.ones(1)}, keep=1)
    assert names(tmp_path) == []


# -------------------------------------------------------------------------------- faults after it is written


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def grow(path):
    path.write_bytes(path.read_bytes() + b"}")


DAMAGES = [truncate, flip_a_bit, empty, grow, Path.unlink]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_set_aside_and_passed_over(tmp_path, file, damage):
    """RELIABILITY row 7."""
    save(tmp_path, 10)
    damaged = save(tmp_path, 20) / file
    damage(damaged)
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(damaged.parent)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20"]  # explicit: no fallback, no renaming
    with pytest.warns(UserWarning, match=f"checkpoint-20/{file}: .*renamed to checkpoint-20.corrupt"):
        assert latest_checkpoint(tmp_path).step == 10
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-20.corrupt"]


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_is_found(tmp_path, file):
    """RELIABILITY row 8."""
    path = save(tmp_path, 10) / file
    intact = path.read_bytes()
    for position in range(0, len(intact), 3):
        flipped = bytearray(intact)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=file):
            load_checkpoint(path.parent)
    path.write_bytes(intact)
    load_checkpoint(path.parent)


def test_all_corrupt_is_an_error_and_stays_one(tmp_path):
    """RELIABILITY row 9."""
    for step, file in ((10, "state.json"), (20, "student.safetensors")):
        empty(save(tmp_path, step) / file)
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"(?s)student.safetensors.*state.json"):
        latest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no valid checkpoint is left.*\n.*checkpoint-10.corrupt"):
        latest_checkpoint(tmp_path)  # the same command again: still never a silent fresh start
    shutil.rmtree(tmp_path / "checkpoint-10.corrupt")
    shutil.rmtree(tmp_path / "checkpoint-20.corrupt")
    assert latest_checkpoint(tmp_path) is None


def test_the_same_step_can_go_bad_twice(tmp_path):
    save(tmp_path, 10)
    for _ in range(2):
        empty(save(tmp_path, 20) / "state.json")
        with pytest.warns(UserWarning, match="state.json"):
            assert latest_checkpoint(tmp_path).step == 10
    assert len(list(tmp_path.glob("checkpoint-20*.corrupt"))) == 2


def test_an_explicit_path_must_be_right(tmp_path):
    """RELIABILITY row 10: there is no such checkpoint, or it is a file."""
    path = save(tmp_path, 500)
    with pytest.raises(CheckpointError, match="checkpoint-5000: no such checkpoint; did you mean 'checkpoint-500'"):
        load_checkpoint(tmp_path / "checkpoint-5000")
    with pytest.raises(CheckpointError, match="state.json: expected a folder, got a file"):
        load_checkpoint(path / "state.json")


@pytest.mark.parametrize("manifest", ["[]", "null", "{}", '{"sha256": 3}', "\xff"])
def test_a_foreign_manifest_is_refused(tmp_path, manifest):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(CheckpointError, match="manifest.json: not a complete manifest"):
        load_checkpoint(path)


def reseal(folder: Path, **changes: object) -> None:
    """Write a manifest that fits the files as they are now, with some entries changed."""
    content = {"step": int(folder.name.split("-")[1]), "files": {}, "versions": {}}
    for path in folder.iterdir():
        if path.name != "manifest.json":
            content["files"][path.name] = {"size": path.stat().st_size, "sha256": checkpoint.sha256_of(path)}
    content |= changes
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": checkpoint._digest(content)}))


STATE = {"stage": 0, "stage_name": "train", "done": 20, "config": {}}
DAMAGED_STATES = {
    "text": "junk", "nothing": "", "list": "[]", "null": "null", "nested": "[" * 100_000, "bytes": "\xff\xfe",
    "lacks a key": json.dumps({"stage": 0}), "wrong type": json.dumps({**STATE, "stage": "first"}),
    "wrong cost": json.dumps({**STATE, "cost": {"steps": [1]}}),
    "wrong signs": json.dumps({**STATE, "signs": {"a": 1}}),
    "unknown key": json.dumps({**STATE, "stagge": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED_STATES)
def test_a_damaged_state_with_a_whole_manifest_counts_as_corrupt(tmp_path, name):
    """FAULTS 9: nine of nine such states were tracebacks. RELIABILITY row 7."""
    for step in (10, 20):
        folder = save_checkpoint(tmp_path, step, groups(step), {**STATE, "done": step}, keep=9)
    (folder / "state.json").write_text(DAMAGED_STATES[name], encoding="latin-1")
    reseal(folder)
    with pytest.warns(UserWarning, match=r"checkpoint-20/state\.json: .*renamed to checkpoint-20\.corrupt"):
        assert latest_checkpoint(tmp_path, SavedState).state.done == 10
    (tmp_path / "checkpoint-10/state.json").write_text(DAMAGED_STATES[name], encoding="latin-1")
    reseal(tmp_path / "checkpoint-10")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=r"(?s)no valid checkpoint is left.*state"):
        latest_checkpoint(tmp_path, SavedState)


@pytest.mark.parametrize(
    "changes",
    [{"step": "20"}, {"files": []}, {"files": {"state.json": 3}}, {"files": {"state.json": {"size": 1}}}, {"step": 10}],
)
def test_a_manifest_of_the_wrong_form_or_step_counts_as_corrupt(tmp_path, changes):
    """A manifest's step was not compared with the folder's name: a renamed one was trained on as another step."""
    save(tmp_path, 10)
    reseal(save(tmp_path, 20), **changes)
    with pytest.warns(UserWarning, match=r"checkpoint-20.*manifest"):
        assert latest_checkpoint(tmp_path).step == 10


@pytest.mark.parametrize(("stage", "done"), [(7, 20), (-1, 20), (0, 19), (0, -1), (1, 20)])
def test_a_position_that_the_run_does_not_have_is_a_sentence(tmp_path, stage, done):
    state = SavedState(stage=stage, stage_name="train", done=done, config={})
    with pytest.raises(CheckpointError, match=r"checkpoint-20/state\.json: (stage|done): "):
        state.check(Checkpoint(tmp_path / "checkpoint-20", 20, state), [Stage("train", 20), Stage("more", 5)])


@pytest.mark.parametrize("how", ["lost", "renamed", "of another shape"])
def test_weights_of_another_network_are_a_sentence(tmp_path, how):
    """RELIABILITY row 10: of another architecture."""
    run = make_run(tmp_path, "progressive", save_every=1)
    train_until(run, 2)
    folder = tmp_path / "run/checkpoint-2"
    tensors = load_file(folder / "weights.safetensors")
    name, tensor = next(iter(tensors.items()))
    del tensors[name]
    if how != "lost":
        tensors["student/other" if how == "renamed" else name] = torch.cat([tensor, tensor])
    save_file(tensors, folder / "weights.safetensors")
    reseal(folder)
    with pytest.raises(CheckpointError, match=rf"checkpoint-2: .*{name}"):
        make_run(tmp_path, "progressive", save_every=1).train()


def test_a_checkpoint_that_cannot_be_renamed_is_a_sentence(tmp_path, monkeypatch):
    empty(save(tmp_path, 10) / "state.json")
    monkeypatch.setattr(Path, "rename", lambda path, to: disk_full())
    with pytest.raises(CheckpointError, match=r"checkpoint-10: cannot be renamed to checkpoint-10\.corrupt: No space"):
        latest_checkpoint(tmp_path)


def test_a_file_that_changes_after_verification_is_named(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 1))
    truncate(loaded.path / "student.safetensors")
    with pytest.raises(CheckpointError, match="student.safetensors: cannot be read"):
        loaded.tensors("student")


# -------------------------------------------------------------------------------------------- optimizers


class Numbered(torch.optim.Optimizer):
    """Keeps Python numbers in its state, as some third-party optimizers do."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self):
        for parameter in (p for p in self.param_groups[0]["params"] if p.grad is not None):
            state = self.state[parameter] or {"count": 0, "scale": 1 / 3, "flag": True}
            assert [type(state[name]) for name in ("count", "scale", "flag")] == [int, float, bool]
            state["count"] += 1
            state["scale"] /= 3
            self.state[parameter].update(state)
            parameter.data -= self.param_groups[0]["lr"] * state["scale"] * parameter.grad / state["count"]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw amsgrad foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "radam": lambda p: OptimConfig(name="radam", lr=1e-2).make([list(p)]),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "numbered": Numbered,
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),  # one factor per row, one per column
}


class Net(nn.Module):
    """A channels_last convolution, a bfloat16 weight, and a parameter that no gradient reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.unused = nn.Parameter(torch.ones(3))
        self.gain = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).mean((2, 3)) * self.gain


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        net(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_training_continues_bit_for_bit(tmp_path, name, steps):
    net = Net()
    optimizer = OPTIMIZERS[name](net.parameters())
    train(net, optimizer, range(steps))
    content = {"net": net.state_dict(), "optimizer": optimizer_tensors(optimizer)}
    path = save_checkpoint(tmp_path, steps, content, {}, keep=1)
    train(net, optimizer, range(steps, 6))

    resumed = Net()
    resumed_optimizer = OPTIMIZERS[name](resumed.parameters())
    loaded = load_checkpoint(path)
    resumed.load_state_dict(loaded.tensors("net"))
    restore_optimizer(resumed_optimizer, loaded.tensors("optimizer"))
    train(resumed, resumed_optimizer, range(steps, 6))
    assert all(identical(a, b) for a, b in zip(net.parameters(), resumed.parameters(), strict=True))
    before, after = optimizer_tensors(optimizer), optimizer_tensors(resumed_optimizer)
    assert before.keys() == after.keys() and all(identical(before[key], after[key]) for key in before)


def test_a_restored_optimizer_owns_its_state():
    net = Net()
    optimizer, other = (torch.optim.AdamW(net.parameters()) for _ in range(2))
    train(net, optimizer, range(2))
    tensors = optimizer_tensors(optimizer)
    copies = {key: value.clone() for key, value in tensors.items()}
    restore_optimizer(other, tensors)
    train(net, other, range(2))
    assert all(identical(tensors[key], copies[key]) for key in tensors)


def test_the_learning_rate_is_the_configs():
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, optimizer, range(1))
    other = torch.optim.AdamW(net.parameters(), lr=5e-4)
    restore_optimizer(other, optimizer_tensors(optimizer))
    assert other.param_groups[0]["lr"] == 5e-4


def stepped_tensors() -> dict[str, Tensor]:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, range(1))
    return optimizer_tensors(optimizer)


def test_optimizer_entries_are_named_by_index():
    tensors = stepped_tensors()
    order = [name for name, _ in Net().named_parameters()]
    stepped = [str(index) for index, name in enumerate(order) if name != "unused"]
    expected = {f"{index}.{name}" for index in stepped for name in ("step", "exp_avg", "exp_avg_sq")}
    assert tensors.keys() == expected | {"stateless"}
    assert tensors["stateless"].tolist() == [order.index("unused")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("2.exp_avg"), r"'2.exp_avg' is missing \(expected one of shape \(4, 3, 3, 3\)\)"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("3.")], "'3.step' is missing"),
        (lambda t: t.pop("stateless"), "'0.step' is missing"),
        (lambda t: t.update({"3.exp_avg": torch.ones(5)}), r"'3.exp_avg' has shape \(5,\), expected \(4,\)"),
        (lambda t: t.update({"4.exp_avg": torch.ones(5)}), "'4.exp_avg' belongs to none of the 4 parameters"),
        (lambda t: t.update({"momentum": torch.ones(5)}), "'momentum' belongs to none"),
        (lambda t: t.clear(), "'0.step' is missing"),
    ],
)
def test_entries_that_do_not_fit_are_named(change, message):
    tensors = stepped_tensors()
    change(tensors)
    optimizer = torch.optim.AdamW(Net().parameters())
    with pytest.raises(CheckpointError, match=message):
        restore_optimizer(optimizer, tensors)
    assert not optimizer.state


def test_making_a_state_moves_no_bit():
    net, before = Net(), Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    make_state(optimizer, list(net.parameters()))
    assert all(identical(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))
    assert optimizer.param_groups[0]["lr"] == 1e-2 and len(optimizer.state) == 4


# -------------------------------------------------------------------------------------------------- lock


def test_a_second_run_in_the_folder_is_refused_and_a_later_one_is_not(tmp_path):
    """RELIABILITY row 32."""
    with RunLock(tmp_path / "run"):
        for _ in range(2):  # a refused run does not free the lock
            with pytest.raises(CheckpointError, match=f"run: in use by another run .pid {os.getpid()} on "):
                RunLock(tmp_path / "run").__enter__()
    with RunLock(tmp_path / "run"):
        pass
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path / "run"):
        _ = 1 / 0
    with RunLock(tmp_path / "run"):
        pass


def test_the_lock_of_a_killed_run_is_free_at_once(tmp_path):
    folder, note = tmp_path / "run", tmp_path / "worker"

    def hold():
        RunLock(folder).__enter__()
        if not os.fork():  # like a data worker, which lives on for seconds when its parent is killed
            note.write_text(f"{os.getpid()}\n")  # from the worker, whose side of the fork is then over
        time.sleep(60)

    with started(tmp_path, hold) as processes:
        wait_until(lambda: processes.ended() or (note.is_file() and note.read_text().endswith("\n")))
        worker, holder = int(note.read_text()), processes.pids[0]
        try:
            with pytest.raises(CheckpointError, match=f"pid {holder} on "):
                RunLock(folder).__enter__()
            processes.kill(0)
            assert processes.wait() == [-signal.SIGKILL]
            os.kill(worker, 0)  # still there
            assert f"pid {holder} on " in (folder / ".lock").read_text()
            with RunLock(folder):
                assert f"pid {os.getpid()} on " in (folder / ".lock").read_text()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_another_hosts_lock_is_left_to_the_user(tmp_path):
    (tmp_path / ".lock").write_text("pid 1 on elsewhere")
    with pytest.raises(CheckpointError, match=r"pid 1 on elsewhere\); if it has ended, remove .*\.lock"):
        RunLock(tmp_path).__enter__()
    assert (tmp_path / ".lock").read_text() == "pid 1 on elsewhere"


def test_an_unusable_output_dir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be used as output_dir"):
        RunLock(tmp_path / "file").__enter__()


# ---------------------------------------------------------------------------------------- on the disk


def test_the_manifest_lists_everything_else(tmp_path):
    path = save(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted([*manifest["files"], "manifest.json"]) == names(path) == FILES
    assert manifest["step"] == 7 and manifest["versions"]["torch"] == version("torch")


def test_a_hostile_safetensors_header_is_our_error(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 1))
    path = loaded.path / "student.safetensors"
    save_file({"weight": torch.ones(4)}, path)
    header = path.read_bytes()
    for content in (b"abcd", header + b"junk", (2**60).to_bytes(8, "little") + header[8:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="student.safetensors: cannot be read"):
            loaded.tensors("student")
