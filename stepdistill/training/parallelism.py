"""How the processes of a run share its networks: one process, replicas (DDP), or shards (FSDP2).

The trainer asks a :class:`Parallelism` for whatever differs between the three, so that its loop reads the same for all
of them. What knows how to shard a distiller is in :mod:`stepdistill.training.fsdp`.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from stepdistill.methods.base import Distiller
from stepdistill.networks.sharding import gathered
from stepdistill.training import fsdp
from stepdistill.training.config import TrainConfig


class Parallelism(abc.ABC):
    """How the processes of a run share its networks.

    Args:
        accelerator: the run's.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    @abc.abstractmethod
    def participates(self) -> bool:
        """Whether this process samples, measures and exports along with the main one."""

    @abc.abstractmethod
    def wrap(self, distiller: Distiller) -> nn.Module:
        """Move a distiller to the device, and return the module whose forward computes a turn's losses."""

    def no_sync(self, wrapped: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which backward passes keep their gradients to this process."""
        del wrapped
        return contextlib.nullcontext()

    def average_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Average over the processes the gradients that the backward pass has not averaged."""
        del params

    def clip(self, params: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scale gradients to a norm of at most ``limit``, and return the norm they had."""
        return nn.utils.clip_grad_norm_(params, limit)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors on the main process, and nothing elsewhere; all processes call it together."""
        return gathered(tensors, keep=self.accelerator.is_main_process)


@final
class SingleProcess(Parallelism):
    """One process holds everything."""

    @property
    def participates(self) -> bool:
        return True

    def wrap(self, distiller: Distiller) -> nn.Module:
        return distiller.to(self.accelerator.device)


@final
class Replicated(Parallelism):
    """Every process holds all networks, and the backward pass averages gradients (DDP)."""

    @property
    def participates(self) -> bool:
        return self.accelerator.is_main_process

    def wrap(self, distiller: Distiller) -> nn.Module:
        return self.accelerator.prepare(distiller.to(self.accelerator.device))

    def no_sync(self, wrapped: nn.Module) -> contextlib.AbstractContextManager[Any]:
        return self.accelerator.no_sync(wrapped)


@final
class Sharded(Parallelism):
    """Every process holds a shard of every network (FSDP2), so none can run or read a network alone."""

    @property
    def participates(self) -> bool:
        return True

    def wrap(self, distiller: Distiller) -> nn.Module:
        fsdp.shard_bank(distiller, self.accelerator)
        return distiller.to(self.accelerator.device)

    def average_gradients(self, params: Sequence[nn.Parameter]) -> None:
        fsdp.average_gradients(params)

    def clip(self, params: Sequence[nn.Parameter], limit: float) -> Tensor:
        return fsdp.clip_gradients(params, limit)


def choose_parallelism(accelerator: Accelerator) -> Parallelism:
    """Return what the launcher asked for.

    Raises:
        ValueError: if it asked for something this project does not support, see :func:`fsdp.is_wanted`.
    """
    if fsdp.is_wanted(accelerator):
        return Sharded(accelerator)
    if accelerator.num_processes > 1:
        return Replicated(accelerator)
    return SingleProcess(accelerator)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return an accelerator with explicit precision, and DDP that allows parameters without gradients."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise processes on CPUs would not find each other
        mixed_precision={"fp32": "no", "bf16": "bf16"}[config.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output_dir,
    )
    if config.tracker != "none":
        accelerator.init_trackers("stepdistill")
    return accelerator
