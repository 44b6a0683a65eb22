"""A table of what a run will hold in memory, before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from stepdistill.methods.base import Distiller
from stepdistill.networks.bank import TEACHER

HEADER = ("role", "parameters", "trainable", "weights MB", "gradients MB", "optimizer MB")


@dataclasses.dataclass(frozen=True)
class Holding:
    """One row of the table: the parameters of a role or of a frozen module."""

    name: str
    count: int
    weights: float
    """Megabytes."""
    trained: bool

    @classmethod
    def of(cls, name: str, parameters: Iterable[nn.Parameter], trained: bool) -> Holding:
        """Count parameters."""
        count, size = 0, 0
        for parameter in parameters:
            count += parameter.numel()
            size += held_bytes(parameter)
        return cls(name, count, size / 1e6, trained)

    @property
    def gradients(self) -> float:
        """Megabytes of float32 gradients."""
        return 4 * self.count / 1e6 if self.trained else 0.0

    @property
    def optimizer(self) -> float:
        """Megabytes of the optimiser's two moments, in float32."""
        return 2 * self.gradients

    @property
    def total(self) -> float:
        """Megabytes of weights, gradients and optimiser."""
        return self.weights + self.gradients + self.optimizer

    def cells(self) -> tuple[str, ...]:
        """Return the row under :data:`HEADER`."""
        sizes = (f"{self.weights:.1f}", f"{self.gradients:.1f}", f"{self.optimizer:.1f}")
        return (self.name, f"{self.count:,}", str(self.trained), *sizes)


def held_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor holds; of a quantised one, those of its parts."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(held_bytes(getattr(tensor, name)) for name in names)


def held_between_steps(distiller: Distiller) -> float:
    """Return the megabytes of weights and optimisers: all but gradients and activations, which a step gives back."""
    held = 0.0
    for holding in _roles(distiller):
        held += holding.weights + holding.optimizer
    return held


def memory_plan(distiller: Distiller, *, encoded: bool = False) -> str:
    """Return a table of parameters and megabytes of weights, gradients and optimiser by role, on each device.

    Args:
        distiller: the method, its networks built.
        encoded: whether the data is latents and embeddings; encoders are then on the device only while it samples.
    """
    roles, encoders = list(_roles(distiller)), list(_encoders(distiller))
    on_device = roles if encoded else [*roles, *encoders]
    lines = ["memory, activations not counted:", *_aligned([*roles, *encoders])]
    if encoded and encoders:
        lines.append(f"the last {len(encoders)} stay on the CPU, except to sample: they are not in the total")
    total = sum(holding.total for holding in on_device)
    return "\n".join([*lines, f"total: {total:.1f} MB", _share_of_copies(distiller)])


def _roles(distiller: Distiller) -> Iterator[Holding]:
    bank = distiller.bank
    for role in bank.roles:
        yield Holding.of(role, bank.params(role), bank.trainable.get(role, True))
    own = [parameter for name, parameter in distiller.named_parameters() if not name.startswith("bank.")]
    if own:
        yield Holding.of("(critic)", own, True)


def _encoders(distiller: Distiller) -> Iterator[Holding]:
    for module in distiller.family.frozen_modules:
        yield Holding.of(f"({type(module).__name__})", module.parameters(), False)


def _share_of_copies(distiller: Distiller) -> str:
    """Return how many parameters the networks have, compared with a full copy per role."""
    counts = {}
    for role in distiller.bank.roles:
        counts[role] = Holding.of(role, distiller.bank.params(role), False).count
    ratio = sum(counts.values()) / counts[TEACHER]
    return f"networks: {ratio:.2f}x the teacher's parameters; as full copies {len(counts)}.00x"


def _aligned(holdings: Sequence[Holding]) -> list[str]:
    rows = [HEADER, *map(Holding.cells, holdings)]
    columns = []
    for cells in zip(*rows, strict=True):
        width = max(map(len, cells))
        columns.append([cell.rjust(width) for cell in cells])
    return list(map("  ".join, zip(*columns, strict=True)))
