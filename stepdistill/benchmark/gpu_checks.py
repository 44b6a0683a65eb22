"""What must hold on a device before its numbers mean anything: short checks on the embedded teacher.

Each check takes a device and an empty folder, and returns a line on what it saw; it raises :class:`FailedCheckError`.
Those of host syncs and of memory need CUDA; the others also run on a CPU.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.benchmark.floor import FLOORS, begin, example_batch, floor_config
from stepdistill.benchmark.step_cost import WARMUP, make_distiller, make_family, make_trainer
from stepdistill.export.pipeline import load_pipeline
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.inference.sampling import sample_images
from stepdistill.inference.student import student_images
from stepdistill.training.config import resolve
from stepdistill.training.guards import NonFiniteError
from stepdistill.training.memory import held_between_steps
from stepdistill.training.run import Run
from stepdistill.training.trainer import Trainer

BANKS = ("copy", "adapter")


class FailedCheckError(AssertionError):
    """The device does not do what it must."""


class NotHere(Exception):  # noqa: N818  # no error: the check asks for another device
    """The check needs a GPU."""


def expect(holds: bool, sentence: str) -> None:
    """Raise :class:`FailedCheckError` with the sentence unless it holds."""
    if not holds:
        raise FailedCheckError(sentence)


def small_trainer(device: torch.device, floor: str = "lcm, guided", bank: str = "copy", **train: Any) -> Trainer:
    """Return a trainer of the embedded teacher, at its first step; ``make_trainer`` puts it on the device."""
    torch.manual_seed(0)
    family = load_teacher(TeacherConfig(path="embedded"))
    config = floor_config(FLOORS[floor], 4, train=train, bank={"name": bank, "rank": 4})
    trainer = make_trainer(config, make_distiller(config, family, torch.device("cpu")))
    expect(trainer.device.type == device.type, f"expected to train on {device.type}, got {trainer.device.type}")
    begin(trainer)
    return trainer


def gradients(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """Return the loss of the student's turn at a fixed batch, and its gradient as one vector."""
    torch.manual_seed(1)
    batch, turn = example_batch(trainer.distiller.family, 4, trainer.device), trainer.distiller.turns["student"]
    for parameter in turn.params:  # adapters begin at zero, where half of their gradient is zero
        parameter.data += 0.01 * torch.randn(parameter.shape).to(parameter)
    trainer._train_only(turn)
    trainer._accumulate(turn, [batch])
    found = [parameter.grad.flatten() for parameter in turn.params if parameter.grad is not None]
    with torch.no_grad(), trainer.parallelism.autocast():
        losses = trainer.distiller("student", batch, trainer._draws(turn, 0, 4))
    return torch.stack(list(losses.terms.values())).sum(), torch.cat(found)


# ------------------------------------------------------------------------------------------------- checks


def no_host_sync(device: torch.device, folder: Path) -> str:
    """A step that is not logged makes the host wait for nothing; the first ones may."""
    del folder
    if device.type != "cuda":
        raise NotHere
    for floor in ("lcm, guided", "dmd2, guided"):
        trainer = small_trainer(device, floor)
        batch = example_batch(trainer.distiller.family, 4, device)
        for number in range(WARMUP):
            trainer._step(number, [batch])
            trainer.step += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer._step(WARMUP, [batch])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "none in a step of lcm and dmd2"


def half_precision(device: torch.device, folder: Path) -> str:
    """A step in bfloat16 has about the loss and the gradient of one in float32."""
    del folder
    (loss, exact), (half_loss, half) = (gradients(small_trainer(device, precision=name)) for name in ("fp32", "bf16"))
    cosine = nn.functional.cosine_similarity(exact, half.float(), dim=0).item()
    error = abs(half_loss.item() / loss.item() - 1)
    expect(error < 0.1 and cosine > 0.95, f"loss differs by {error:.1%}, gradient's cosine is {cosine:.4f}")
    return f"loss differs by {error:.2%}, gradient's cosine is {cosine:.4f}"


def checkpointing(device: torch.device, folder: Path) -> str:
    """Gradient checkpointing changes no gradient, under either bank."""
    del folder
    largest = 0.0
    for bank in BANKS:
        plain = gradients(small_trainer(device, bank=bank))[1]
        recomputed = gradients(small_trainer(device, bank=bank, gradient_checkpointing=True))[1]
        largest = max(largest, ((plain - recomputed).norm() / plain.norm()).item())
    expect(largest < 1e-4, f"gradients differ by {largest:.1e} of their norm")
    return f"gradients differ by {largest:.1e} of their norm"


def run_sections(folder: Path, **train: Any) -> dict[str, Any]:
    """Return the configuration of a short run of the embedded teacher, with its own images."""
    return {
        "teacher": {"path": "embedded"},
        "method": {"name": "lcm", "steps": 2, "solver_steps": 4},
        "data": {"name": "images", "path": "embedded", "batch_size": 4},
        "train": {"steps": 4, "save_every": 2, "sample_every": 100, "output_dir": str(folder / "run"), **train},
    }


def exact_resume(device: torch.device, folder: Path) -> str:
    """A run that is taken up from a checkpoint ends in the weights of one that was not stopped."""
    del device
    wanted = resolve(run_sections(folder))
    ends = []
    for stopped in (False, True):
        config = dataclasses.replace(
            wanted, train=dataclasses.replace(wanted.train, output_dir=str(folder / str(stopped)))
        )
        if stopped:
            _stop_at(Run(config), 2)
        Run(config).train()
        ends.append(load_file(folder / str(stopped) / "checkpoint-4/weights.safetensors"))
    different = [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])]
    expect(not different, f"{len(different)} of {len(ends[0])} tensors differ")
    return f"{len(ends[0])} tensors, equal to the bit"


def _stop_at(run: Run, step: int) -> None:
    """Train until a step is saved, and leave."""
    run.folder.mkdir(parents=True)
    trainer = run.trainer()
    save = trainer._save

    def leave(position: Any) -> None:
        save(position)
        if trainer.step == step:
            raise KeyboardInterrupt

    trainer._save = leave  # type: ignore[method-assign]
    try:
        for _ in trainer.run(trainer.restore()):
            pass
    except KeyboardInterrupt:
        return


def export_equals_sampler(device: torch.device, folder: Path) -> str:
    """The exported pipeline draws what the trainer's sampler draws."""
    run = Run(resolve(run_sections(folder)))
    pipeline = load_pipeline(run.train()).to(device)
    ours = student_images(run.distiller, 4, seed=0, device=device)
    theirs = sample_images(pipeline, 4, seed=0, num_classes=run.family.num_classes)
    furthest = (ours.pixels.int() - theirs.pixels.int()).abs().max().item()
    expect(furthest <= 1, f"images differ by {furthest} of 255")
    return f"images differ by at most {furthest} of 255"


def no_save_after_nan(device: torch.device, folder: Path) -> str:
    """A number that is not finite ends the run before a checkpoint is written, and no weight has moved."""
    del device
    run = Run(resolve(run_sections(folder, save_every=1)))
    before = copy.deepcopy(run.distiller.bank.state("student"))
    loss = run.distiller.turns["student"].loss

    def poisoned(batch: Any, draws: Any) -> Any:
        losses = loss(batch, draws)
        return losses._replace(terms={name: value * torch.nan for name, value in losses.terms.items()})

    run.distiller.turns["student"] = dataclasses.replace(run.distiller.turns["student"], loss=poisoned)
    try:
        run.train()
    except NonFiniteError:
        saved = list((folder / "run").glob("checkpoint-*"))
        moved = [
            name
            for name, tensor in run.distiller.bank.state("student").items()
            if not torch.equal(tensor.cpu(), before[name])
        ]
        expect(not saved and not moved, f"{len(saved)} checkpoints, {len(moved)} tensors moved")
        return "no checkpoint, no weight moved"
    raise FailedCheckError("the run went on")


def planned_memory(device: torch.device, folder: Path) -> str:
    """What a GPU holds between two steps of SD 1.5's size is what the plan says, within 10 %."""
    del folder
    if device.type != "cuda":
        raise NotHere
    before = torch.cuda.memory_allocated()
    family = make_family("sd", False, device)
    config = floor_config(FLOORS["lcm"], 1, train={"precision": "bf16", "gradient_checkpointing": True})
    distiller = make_distiller(config, family, device)
    family.frozen_modules = ()
    trainer = make_trainer(config, distiller)
    begin(trainer)
    trainer._step(0, [example_batch(family, 1, device)])
    held, planned = (torch.cuda.memory_allocated() - before) / 1e6, held_between_steps(distiller, config)
    expect(abs(held / planned - 1) < 0.1, f"holds {held:.0f} MB where the plan says {planned:.0f}")
    return f"holds {held:.0f} MB, the plan says {planned:.0f}"


CHECKS: dict[str, Callable[[torch.device, Path], str]] = {
    "no host sync in a step": no_host_sync,
    "bf16 near fp32": half_precision,
    "gradient checkpointing": checkpointing,
    "exact resume": exact_resume,
    "export equals sampler": export_equals_sampler,
    "no save after a NaN": no_save_after_nan,
    "memory as planned": planned_memory,
}


def check_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield whether each check passed on this machine's device, and what it saw; all are made, each in a new folder."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    for name, check in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            yield name, outcome(check, device, Path(folder))


def outcome(check: Callable[[torch.device, Path], str], device: torch.device, folder: Path) -> dict[str, Any]:
    """Return whether a check passed, and what it saw."""
    try:
        return {"passed": True, "seen": check(device, folder)}
    except NotHere:
        return {"left_out": "needs a GPU"}
    except (FailedCheckError, RuntimeError, ValueError) as error:
        return {"passed": False, "seen": f"{type(error).__name__}: {error}"}
