"""Which networks a turn calls, on how many images, and where gradients are taken."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.methods.base import Distiller
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.features import BlockFeatures
from stepdistill.randomness import Draws


def calls_of(distiller: Distiller, turn: str, batch: Batch, draws: Draws) -> Counter[str]:
    """Forwards per image of the batch by role; ``<role> with gradient`` are those that a backward passes through."""
    calls: Counter[str] = Counter()
    original = Denoiser.raw

    def counted(self: Denoiser, x_t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = f"{self.role} with gradient" if torch.is_grad_enabled() else self.role
        calls[name] += len(x_t)
        return original(self, x_t, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Denoiser, "raw", counted)
        distiller(turn, batch, draws)
    assert all(count % batch.size == 0 for count in calls.values())
    return Counter({name: count // batch.size for name, count in calls.items()})


def features_of(distiller: Distiller, turn: str, batch: Batch, draws: Draws) -> int:
    """Passes per image of the batch through a critic's features."""
    images: list[int] = []
    original = BlockFeatures.__call__

    def counted(self: BlockFeatures, x_t: Tensor, *args: Any) -> list[Tensor]:
        images.append(len(x_t))
        return original(self, x_t, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockFeatures, "__call__", counted)
        distiller(turn, batch, draws)
    return sum(images) // batch.size
