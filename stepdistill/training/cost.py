"""The cost of a training, in a unit that compares across machines and methods: images that passed through a network.

A hook on every network of the bank counts them: an image counts once for a forward, once more for a forward derivative
in the same pass, and twice more for a backward. One unit is a *teacher forward*, because the networks of
all roles have the teacher's size. Sampling, measuring and saving during the training are not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from stepdistill.networks.bank import NetworkBank
from stepdistill.networks.tangents import Dual

FORWARDS = "cost/teacher_forwards"
"""Where rows of a run's log hold the teacher forwards so far."""


@dataclasses.dataclass(kw_only=True)
class TrainingCost:
    """Totals of a run over all its processes and resumptions, without the steps that a kill has undone."""

    steps: int = 0
    images: int = 0
    """Images that were read, counted each time."""
    teacher_forwards: int = 0
    """Images that passed through a network, counted 1 for a forward, 3 with its backward, 1 more with a derivative."""
    cpu_minutes: float = 0.0
    """CPU time of the training processes with all their threads, without data workers."""
    wall_minutes: float = 0.0

    def __add__(self, other: TrainingCost) -> TrainingCost:
        """Return the sum, which is the cost of a student that started from another."""
        total = TrainingCost()
        for field in dataclasses.fields(self):
            setattr(total, field.name, getattr(self, field.name) + getattr(other, field.name))
        return total

    def __str__(self) -> str:
        return (
            f"{self.steps:,} training steps, {self.images:,} images, {self.teacher_forwards:,} teacher forwards, "
            f"{self.cpu_minutes:.1f} CPU minutes, {self.wall_minutes:.1f} minutes"
        )


@contextlib.contextmanager
def counted(bank: NetworkBank, cost: TrainingCost) -> Iterator[None]:
    """Add to ``cost`` the images that pass through the bank's networks in the context, and the minutes."""
    hook = functools.partial(_count, cost)
    handles = [network.register_forward_pre_hook(hook, with_kwargs=True) for network in bank.distinct_networks()]
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        yield
    finally:
        cost.cpu_minutes += (time.process_time() - cpu) / 60
        cost.wall_minutes += (time.perf_counter() - wall) / 60
        for handle in handles:
            handle.remove()


def over_processes(cost: TrainingCost, accelerator: Accelerator) -> TrainingCost:
    """Return the sum over all processes, which call this together."""
    shares = [cost.images, cost.teacher_forwards, cost.cpu_minutes]
    total = accelerator.reduce(torch.tensor(shares, dtype=torch.float64, device=accelerator.device), reduction="sum")
    images, teacher_forwards, cpu_minutes = total.tolist()
    return dataclasses.replace(
        cost, images=int(images), teacher_forwards=int(teacher_forwards), cpu_minutes=cpu_minutes
    )


def _count(cost: TrainingCost, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count before a forward, because one that computes inner features only ends early (and counts in full)."""
    images = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (images, *network.parameters()))
    cost.teacher_forwards += len(images) * (1 + isinstance(images, Dual) + 2 * backward)
