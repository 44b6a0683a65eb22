"""The tensors of a run that its checkpoints hold, and the checkpoint from which a run resumes."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from stepdistill.methods.base import Distiller
from stepdistill.networks.bank import TEACHER
from stepdistill.networks.sharding import write
from stepdistill.training.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint


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
def load_weights(distiller: Distiller, tensors: dict[str, Tensor]) -> None:
    """Write the tensors of :func:`trained_weights` back.

    Raises:
        ValueError: if they are those of another distiller.
    """
    targets = trained_weights(distiller)
    # an older run kept a copy of the student where its average has no decay
    tensors = {name: tensor for name, tensor in tensors.items() if name.partition("/")[0] not in distiller.unused_roles}
    if differing := sorted(set(targets) ^ set(tensors)):
        raise ValueError(f"checkpoint: its tensors are not this run's; the first difference is {differing[0]!r}")
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            shapes = f"expected {tuple(target.shape)}, got {tuple(tensors[name].shape)}"
            raise ValueError(f"checkpoint: {name}: {shapes}")
    for name, target in targets.items():
        write(target, tensors[name])


def newest_checkpoint(folder: Path, accelerator: Accelerator) -> Checkpoint | None:
    """Return the checkpoint to resume from, the same in all processes, which call this together.

    The main process chooses it, because that may set a corrupt one aside.
    """
    checkpoint = latest_checkpoint(folder) if accelerator.is_main_process else None
    if accelerator.num_processes == 1:
        return checkpoint
    (path,) = broadcast_object_list([checkpoint and str(checkpoint.path)])
    return checkpoint if path is None or checkpoint is not None else load_checkpoint(path)
