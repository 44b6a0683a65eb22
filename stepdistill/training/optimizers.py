"""The optimiser of a turn, and its learning rate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepdistill.files.ranges import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """One entry of the ``optim`` section: an optimiser and its schedule, restarted in every stage."""

    name: Literal["adamw", "radam"] = "adamw"
    """``radam`` needs no warm-up (Liu et al. 2019, arXiv 1908.03265); the papers on consistency models use it."""
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
        """Return a new optimiser of groups of parameters; it skips its step while its ``found_inf`` is 1."""
        params = [{"params": group} for group in groups]
        options: dict[str, Any] = {"lr": self.lr, "betas": (self.betas[0], self.betas[1]), "eps": self.eps}
        if self.name == "radam":
            return RAdam(params, **options, weight_decay=self.weight_decay, decoupled_weight_decay=True)
        return torch.optim.AdamW(params, **options, weight_decay=self.weight_decay, fused=True)


class RAdam(torch.optim.RAdam):
    """RAdam that respects ``found_inf`` as fused optimisers do; torch has no fused one, so it waits for the device."""

    found_inf: Tensor | None = None

    def step(self, closure: Any = None) -> Any:
        """Make one step, unless ``found_inf`` is 1."""
        if self.found_inf is not None and bool(self.found_inf):
            return None
        return super().step(closure)


def step_at(optimizer: torch.optim.Optimizer, rate: float, skip: Tensor) -> None:
    """Make one step at a learning rate, and forget the gradients; nothing moves if ``skip``, a scalar, is 1."""
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
