"""How the processes of a run share its networks: one process, replicas (DDP), or shards (FSDP2).

The trainer asks a :class:`Parallelism` for whatever differs between the three, so that its loop reads the same for all
of them. What knows how to shard a distiller is in :mod:`stepdistill.training.fsdp`.
"""

from __future__ import annotations

import abc
import contextlib
import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, final

import torch
from accelerate import Accelerator
from accelerate.state import is_initialized
from accelerate.utils import InitProcessGroupKwargs, is_tensorboard_available, is_wandb_available
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stepdistill.methods.base import Distiller
from stepdistill.networks.launcher import ACCUMULATION, PRECISION, open_accelerator
from stepdistill.networks.sharding import gathered
from stepdistill.training import fsdp
from stepdistill.training.allocator import keep_freed_memory
from stepdistill.training.config import TrainConfig

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

GRACE = 10.0
"""Seconds by which the backend waits longer than ``train.timeout``."""


class Parallelism(abc.ABC):
    """How the processes of a run share its networks.

    Args:
        accelerator: the run's.
        precision: that in which networks compute: ``fp32``, ``bf16`` or ``fp16``.
    """

    def __init__(self, accelerator: Accelerator, precision: str = "fp32") -> None:
        self.accelerator = accelerator
        self.precision = precision

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which networks compute in the run's precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.accelerator.device.type, HALVES[self.precision])

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
        distiller, device = distiller.to(self.accelerator.device), self.accelerator.device
        devices = None if device.type == "cpu" else [device]
        return DistributedDataParallel(distiller, device_ids=devices, find_unused_parameters=True)

    def no_sync(self, wrapped: nn.Module) -> contextlib.AbstractContextManager[Any]:
        return cast(DistributedDataParallel, wrapped).no_sync()


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


def choose_parallelism(accelerator: Accelerator, precision: str) -> Parallelism:
    """Return what the launcher asked for.

    Raises:
        ValueError: if it asked for something this project does not support, see :func:`fsdp.is_wanted`.
    """
    if fsdp.is_wanted(accelerator):
        if precision == "fp16":
            raise ValueError("train.precision: expected bf16 or fp32 for networks divided among processes, got fp16")
        return Sharded(accelerator, precision)
    if accelerator.num_processes > 1:
        return Replicated(accelerator, precision)
    return SingleProcess(accelerator, precision)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of a run: processes, device and tracker.

    Precision, accumulation and the averaging of gradients are not left to it, because all accelerators of a session
    share one state, which a notebook or an earlier run may have set.
    """
    # a little longer than the heartbeat waits, which can name the process that is silent
    timeout = datetime.timedelta(seconds=config.timeout + GRACE)
    accelerator = open_accelerator(
        None if is_initialized() else "no",
        {PRECISION: config.precision, ACCUMULATION: str(config.accumulation)},
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def check_tracker(name: str) -> None:
    """Raise ``ValueError`` if the package of ``train.tracker`` is not installed."""
    installed = {"none": lambda: True, "tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if not installed[name]():
        raise ValueError(f"train.tracker: {name} is not installed; run: pip install {name} (or set train.tracker=none)")


@contextlib.contextmanager
def tracking(accelerator: Accelerator) -> Iterator[None]:
    """Log to the accelerator's tracker, if it has one, until the end of the context."""
    if accelerator.log_with:
        accelerator.init_trackers("stepdistill")
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
