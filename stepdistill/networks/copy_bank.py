"""A bank with a full copy of the network for every role."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from stepdistill.networks.activation_checkpointing import set_training, without_checkpointing
from stepdistill.networks.bank import TEACHER, NetworkBank

Place = tuple[str, Mapping[str, Tensor], str]
"""The name of a tensor, the mapping of its module that has it, and the key there."""


class CopyBank(NetworkBank):
    """A full copy of the network for every role."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({TEACHER: network.requires_grad_(False).eval()})
        self._places: dict[nn.Module, list[Place]] = {}

    @contextlib.contextmanager
    def using(self, role: str) -> Iterator[nn.Module]:
        yield self.networks[role]

    def distinct_networks(self) -> list[Any]:
        return list(self.networks.values())

    def extract(self, role: str) -> nn.Module:
        return without_checkpointing(self._copy(self.networks[role], {})).requires_grad_(True)

    def params(self, role: str) -> list[nn.Parameter]:
        return list(self.networks[role].parameters())

    def load_or_project(self, role: str, weights: Mapping[str, Tensor]) -> None:
        self.load(role, weights)

    def train(self, mode: bool = True) -> CopyBank:
        """Set training mode for trainable roles only: averages and teachers have no dropout."""
        self.training = mode
        for role, network in self.networks.items():
            set_training(network, mode and self.trainable[role])
        return self

    def _add(self, role: str, from_: str) -> None:
        self.networks[role] = self._copy(self.networks[from_], {})

    def _own(self, role: str) -> dict[str, Tensor]:
        network = self.networks[role]
        if network not in self._places:
            self._places[network] = places_of(network)
        return {name: tensors[key] for name, tensors, key in self._places[network]}

    def _pairs(self, dst: str, src: str) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.state(dst).values()), list(self.state(src).values())


def places_of(network: nn.Module) -> list[Place]:
    """Return where the tensors of a network are, parameters first; to look for them takes as long as to blend them."""
    found: dict[int, Place] = {}
    for kind in ("_parameters", "_buffers"):
        for prefix, module in network.named_modules():
            tensors = getattr(module, kind)
            for key, tensor in tensors.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (f"{prefix}.{key}" if prefix else key, tensors, key))
    return list(found.values())
