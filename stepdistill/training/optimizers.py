"""The optimiser of a turn, and its learning rate."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stepdistill.files.ranges import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat
from stepdistill.methods.base import Distiller
from stepdistill.networks.sharding import is_share


class FewBits(NamedTuple):
    """An optimiser of another package, whose moments take few bits in blocks with a scale each (arXiv 2110.02861)."""

    package: str
    module: str
    kind: str
    """Name of the class."""
    bits: int
    """Of an entry of a moment."""
    block: int
    """Entries that share a scale of 32 bits."""
    table: int = 0
    """Bytes that a moment takes beside its entries and scales."""

    def state_bytes(self, entries: int) -> int:
        """Return what the two moments of a parameter hold; the packages leave small or odd ones in float32."""
        if entries < SMALL or (self.package == "torchao" and entries % self.block):
            return 8 * entries
        return 2 * (entries * self.bits // 8 + 4 * -(-entries // self.block) + self.table)


SMALL = 4096
"""Parameters of fewer entries have moments of float32."""

FEW_BITS: Mapping[str, FewBits] = MappingProxyType({
    "adamw_8bit": FewBits("torchao", "torchao.optim", "AdamW8bit", 8, 256, 1024),
    "adamw_4bit": FewBits("torchao", "torchao.optim", "AdamW4bit", 4, 128, 64),
    "adamw_fp8": FewBits("torchao", "torchao.optim", "AdamWFp8", 8, 256),
    "bnb_adamw_8bit": FewBits("bitsandbytes", "bitsandbytes.optim", "AdamW8bit", 8, 256),
})  # fmt: skip
"""By ``optim.*.name``. torchao compiles its steps, one for each shape of a parameter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """One entry of the ``optim`` section: an optimiser and its schedule, restarted in every stage."""

    name: Literal["adamw", "radam", "adamw_8bit", "adamw_4bit", "adamw_fp8", "bnb_adamw_8bit"] = "adamw"
    """``radam`` needs no warm-up (Liu et al. 2019, arXiv 1908.03265); the papers on consistency models use it. Moments
    in few bits are those of :data:`FEW_BITS`."""
    lr: PositiveFloat = 1e-4
    betas: tuple[Decay, ...] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls to zero within a stage."""
    warmup: NonNegativeInt = 0
    """Steps of linear warm-up at the start of a stage."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {self.betas}")

    def lr_at(self, step: int, steps: int) -> float:
        """Return the learning rate at ``step`` (from 0) of a stage of ``steps``."""
        decay = {
            "constant": 1.0,
            "linear": 1 - step / steps,
            "cosine": 0.5 * (1 + math.cos(math.pi * step / steps)),
        }[self.schedule]
        return self.lr * decay * min(1.0, (step + 1) / (self.warmup + 1))

    def make(self, groups: Iterable[Sequence[nn.Parameter]]) -> torch.optim.Optimizer:
        """Return a new optimiser of groups of parameters, to be stepped by :func:`step_at`.

        Raises:
            ValueError: for moments in few bits of networks that are divided among processes.
        """
        params = [{"params": group} for group in groups]
        options: dict[str, Any] = {
            "lr": self.lr, "betas": (self.betas[0], self.betas[1]), "eps": self.eps, "weight_decay": self.weight_decay
        }  # fmt: skip
        if self.name == "adamw":
            return torch.optim.AdamW(params, **options, fused=True)
        if self.name == "radam":
            return torch.optim.RAdam(params, **options, decoupled_weight_decay=True)
        if any(map(is_share, params[0]["params"])):
            raise ValueError(
                f"optim.*.name: expected adamw or radam for networks divided among processes, got {self.name}"
            )
        few = FEW_BITS[self.name]
        return getattr(importlib.import_module(few.module), few.kind)(params, **options)

    def state_bytes(self, entries: int) -> int:
        """Return the bytes of the state of a parameter of ``entries`` numbers, without its count of steps."""
        return FEW_BITS[self.name].state_bytes(entries) if self.name in FEW_BITS else 8 * entries


def check_installed(optim: Mapping[str, OptimConfig]) -> None:
    """Raise ``ValueError`` if an optimiser's package is not there, before anything is opened."""
    for turn, config in optim.items():
        few = FEW_BITS.get(config.name)
        if few is not None and importlib.util.find_spec(few.package) is None:
            raise ValueError(
                f"optim.{turn}.name: {config.name} needs the package {few.package}, which is not installed; run: pip "
                f"install {few.package}"
            )


def check_heads(distiller: Distiller, optim: Mapping[str, OptimConfig]) -> None:
    """Raise ``ValueError`` for settings of a head's own where this training has none: nothing would read them."""
    trained = {name for turn in distiller.turns.values() for name in turn.parts}
    for head, owner in distiller.heads.items():
        if head not in trained and optim[head] != optim[owner]:
            raise ValueError(f"optim.{head}: expected none, because these options of the method train no head")


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of an optimiser's last step."""
    return float(optimizer.param_groups[0]["lr"])


def step_at(optimizer: torch.optim.Optimizer, rate: float, skip: Tensor) -> None:
    """Make one step at a learning rate, and forget the gradients; nothing moves if ``skip``, a scalar, is 1.

    Fused optimisers read it on the device. For others the host waits.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.full_like(group["lr"], rate) if torch.is_tensor(group["lr"]) else rate
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not bool(skip):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
