"""A table of what a run will hold in memory, before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from stepdistill.methods.base import Distiller
from stepdistill.networks.bank import EMA, TEACHER
from stepdistill.training.activations import activations
from stepdistill.training.config import RunConfig
from stepdistill.training.optimizers import OptimConfig

HEADER = ("role", "parameters", "trainable", "weights MB", "gradients MB", "optimizer MB")


@dataclasses.dataclass(frozen=True)
class Holding:
    """One row of the table: the parameters of a role or of a frozen module."""

    name: str
    count: int
    weights: float
    """Megabytes."""
    trained: bool
    optimizer: float = 0.0
    """Megabytes of the optimiser's state."""

    @classmethod
    def of(cls, name: str, parameters: Iterable[nn.Parameter], optim: Mapping[int, OptimConfig]) -> Holding:
        """Count parameters; ``optim`` has the optimisers of those that train, by their ``id``."""
        count, size, state, trained = 0, 0, 0, False
        for parameter in parameters:
            count += parameter.numel()
            size += held_bytes(parameter)
            if id(parameter) in optim:
                state += optim[id(parameter)].state_bytes(parameter.numel())
                trained = True
        return cls(name, count, size / 1e6, trained, state / 1e6)

    @property
    def gradients(self) -> float:
        """Megabytes of float32 gradients."""
        return 4 * self.count / 1e6 if self.trained else 0.0

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
    if hasattr(tensor, "quant_state"):  # nf4: a byte holds two weights, and 64 weights have a scale of a byte
        return tensor.numel() + tensor.numel() // 32
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(held_bytes(getattr(tensor, name)) for name in names)


def held_between_steps(distiller: Distiller, config: RunConfig) -> float:
    """Return the megabytes of weights and optimisers: all but gradients and activations, which a step gives back."""
    held = 0.0
    for holding in _roles(distiller, config.optim):
        if not (config.train.offload_ema and holding.name == EMA):
            held += holding.weights + holding.optimizer
    return held


def memory_plan(distiller: Distiller, config: RunConfig, *, encoded: bool = False) -> str:
    """Return a table of parameters and megabytes of weights, gradients and optimiser by role, and a step's peak.

    Args:
        distiller: the method, its networks built.
        config: the run's.
        encoded: whether the data is latents and embeddings; encoders are then on the device only while it samples.
    """
    roles, encoders = list(_roles(distiller, config.optim)), list(_encoders(distiller))
    lines, hosted = ["memory, activations not counted:", *_aligned([*roles, *encoders])], []
    if encoders and (encoded or config.train.offload_encoders):
        names = ", ".join(holding.name for holding in encoders)
        use = "sample" if encoded else "encode and sample"
        lines.append(f"on the CPU, except to {use}, and not in the total: {names}")
        hosted += encoders
    if config.train.offload_ema:
        lines.append("on the CPU, except to sample, and not in the total: ema")
        hosted += [role for role in roles if role.name == EMA]
    total = sum(holding.total for holding in [*roles, *encoders] if holding not in hosted)
    resident = sum(holding.total for holding in encoders if holding not in hosted)
    lines += [f"total: {total:.1f} MB", _step(distiller, config, resident), _share_of_copies(distiller)]
    return "\n".join(lines)


def _step(distiller: Distiller, config: RunConfig, resident: float) -> str:
    """Return a line on what the student's turn holds at its peak; ``resident`` megabytes are the encoders'."""
    try:
        made = activations(distiller, config.train, config.data.batch_size)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"a step's activations: not estimated ({str(error).partition(chr(10))[0]:.100})"
    peak = held_between_steps(distiller, config) + resident + made
    return f"the student's turn: about {made:.1f} MB of activations and gradients, {peak:.1f} MB in all at its peak"


def _roles(distiller: Distiller, optim: Mapping[str, OptimConfig]) -> Iterator[Holding]:
    bank, stepped = distiller.bank, _stepped(distiller, optim)
    for role in bank.roles:
        yield Holding.of(role, bank.params(role), stepped)
    own = [parameter for name, parameter in distiller.named_parameters() if not name.startswith("bank.")]
    if own:
        yield Holding.of("(critic)", own, stepped)


def _stepped(distiller: Distiller, optim: Mapping[str, OptimConfig]) -> dict[int, OptimConfig]:
    """Return the optimiser of every parameter that has one, by its ``id``."""
    stepped: dict[int, OptimConfig] = {}
    for turn in distiller.turns.values():
        for name, params in turn.parts.items():
            stepped |= dict.fromkeys(map(id, params), optim[name])
    return stepped


def _encoders(distiller: Distiller) -> Iterator[Holding]:
    for module in distiller.family.frozen_modules:
        yield Holding.of(f"({type(module).__name__})", module.parameters(), {})


def _share_of_copies(distiller: Distiller) -> str:
    """Return how many parameters the networks have, compared with a full copy per role."""
    counts = {}
    for role in distiller.bank.roles:
        counts[role] = Holding.of(role, distiller.bank.params(role), {}).count
    ratio = sum(counts.values()) / counts[TEACHER]
    return f"networks: {ratio:.2f}x the teacher's parameters; as full copies {len(counts)}.00x"


def _aligned(holdings: Sequence[Holding]) -> list[str]:
    rows = [HEADER, *map(Holding.cells, holdings)]
    columns = []
    for cells in zip(*rows, strict=True):
        width = max(map(len, cells))
        columns.append([cell.rjust(width) for cell in cells])
    return list(map("  ".join, zip(*columns, strict=True)))
