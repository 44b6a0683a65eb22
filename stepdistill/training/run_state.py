"""What a checkpoint of a run holds, and the checkpoint from which a run resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from stepdistill.methods.base import Distiller, Stage
from stepdistill.networks.bank import TEACHER
from stepdistill.networks.sharding import write
from stepdistill.training.checkpoint import Checkpoint, CheckpointError, latest_checkpoint, load_checkpoint
from stepdistill.training.cost import TrainingCost
from stepdistill.training.division import Division


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedState:
    """``state.json`` of a checkpoint. Older ones lack the last keys."""

    stage: int
    """Index of the stage."""
    stage_name: str
    done: int
    """Steps of the stage that are done."""
    config: dict[str, Any]
    """The identity of the run, see :mod:`stepdistill.training.identity`."""
    cost: TrainingCost = dataclasses.field(default_factory=TrainingCost)
    division: Division | None = None
    """Of the samples of a step, see :mod:`stepdistill.training.division`."""
    signs: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    """The logged steps at which each sign of divergence has been present without a break."""
    skipped: list[int] = dataclasses.field(default_factory=list)
    """Steps that were left out lately, see :class:`stepdistill.training.guards.NanPolicy`."""
    skipped_in_all: int = 0
    scales: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """Of the turns' losses, see :class:`stepdistill.training.scaling.LossScaling`."""

    def check(self, checkpoint: Checkpoint, stages: Sequence[Stage]) -> None:
        """Raise ``CheckpointError`` unless the position is one of a run with these stages."""
        file = checkpoint.path / "state.json"
        if not 0 <= self.stage < len(stages):
            raise CheckpointError(f"{file}: stage: expected 0 to {len(stages) - 1}, got {self.stage}")
        steps = sum(stage.steps for stage in stages[: self.stage]) + self.done
        if not 0 <= self.done <= stages[self.stage].steps or steps != checkpoint.step:
            raise CheckpointError(
                f"{file}: done: {self.done} steps of stage {self.stage} are not step {checkpoint.step}"
            )


def trained_weights(distiller: Distiller) -> dict[str, Tensor]:
    """Return everything that training makes: all roles but the teacher, and the method's own modules."""
    weights: dict[str, Tensor] = {}
    for role in distiller.bank.roles:
        if role != TEACHER:
            for name, tensor in distiller.bank.state(role).items():
                weights[f"{role}/{name}"] = tensor
    for name, tensor in distiller.state_dict().items():
        if not name.startswith("bank."):
            weights[name] = tensor
    return weights


@torch.no_grad()
def load_weights(distiller: Distiller, tensors: dict[str, Tensor], source: str = "checkpoint") -> None:
    """Write the tensors of :func:`trained_weights` back; ``source`` is where they come from, for messages.

    Raises:
        CheckpointError: if they are those of another distiller, naming the first that differs.
    """
    targets = trained_weights(distiller)
    # an older run kept a copy of the student where its average has no decay
    tensors = {name: tensor for name, tensor in tensors.items() if name.partition("/")[0] not in distiller.unused_roles}
    if differing := sorted(set(targets) ^ set(tensors)):
        raise CheckpointError(f"{source}: its tensors are not this run's; the first difference is {differing[0]!r}")
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            shapes = f"expected {tuple(target.shape)}, got {tuple(tensors[name].shape)}"
            raise CheckpointError(f"{source}: {name}: {shapes}")
    for name, target in targets.items():
        write(target, tensors[name])


def newest_checkpoint(folder: Path, accelerator: Accelerator) -> Checkpoint | None:
    """Return the checkpoint to resume from, the same in all processes, which call this together.

    The main process chooses it, because that may set a corrupt one aside.
    """
    checkpoint = latest_checkpoint(folder, SavedState) if accelerator.is_main_process else None
    if accelerator.num_processes == 1:
        return checkpoint
    (path,) = broadcast_object_list([checkpoint and str(checkpoint.path)])
    return checkpoint if path is None or checkpoint is not None else load_checkpoint(path, SavedState)
