"""A bank with one frozen network and a LoRA adapter for every role."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.networks.activation_checkpointing import without_checkpointing
from stepdistill.networks.bank import TEACHER, NetworkBank
from stepdistill.networks.quantization import quantize_layers


class AdapterBank(NetworkBank):
    """One frozen network and one LoRA adapter per role; the teacher is the network with its adapters off.

    PEFT's ``set_adapter`` changes ``requires_grad``: between a forward pass and its backward pass, it would silently
    zero the gradient of the adapter that was used. :meth:`using` therefore changes only which adapter is *active*.

    Args:
        network: the teacher; adapter layers are added in place, and its weights are kept.
        rank: rank of the adapters; alpha equals it, so that the update is ``B A`` itself.
        targets: names (or endings of names) of the layers that get adapters.
    """

    def __init__(self, network: nn.Module, *, rank: int, targets: Sequence[str]) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.rank = rank
        self.targets = list(targets)

    @functools.cached_property
    def _layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]

    @contextlib.contextmanager
    def using(self, role: str) -> Iterator[nn.Module]:
        before = []
        for layer in self._layers:
            before.append((layer, layer._active_adapter, layer._disable_adapters))
            layer._active_adapter, layer._disable_adapters = [role], role == TEACHER
        try:
            yield self.network
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled

    def scale(self, role: str, factor: float) -> None:
        self.scales[role] = factor
        for layer in self._layers:
            layer.scaling[role] = factor  # 1 by itself: alpha is the rank

    def quantize(self, form: str) -> None:
        """Hold the frozen layers under the adapters in few bits, see :mod:`stepdistill.networks.quantization`.

        No role can be added afterwards; :meth:`extract` merges adapters into the original layers.
        """
        self.originals = quantize_layers(self._layers, form)
        self._forget_places()

    def distinct_networks(self) -> list[Any]:
        return [self.network]

    def _recomputation(
        self, network: nn.Module
    ) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        del network  # it never leaves evaluation mode
        layer = self._layers[0]
        role = TEACHER if layer._disable_adapters else layer._active_adapter[0]
        return contextlib.nullcontext(), self.using(role)

    def extract(self, role: str) -> nn.Module:
        # a sharded network is put together with its adapters, and its layers are merged below
        merged = {} if self.blueprints else {id(layer): self._merged(layer, role) for layer in self._layers}
        network = without_checkpointing(self._copy(self.network, merged)).float()
        for name, module in list(network.named_modules()):
            if not hasattr(module, "get_base_layer"):
                continue
            if role != TEACHER:
                module._disable_adapters = False
                module.merge(adapter_names=[role])
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())
        network.__dict__.pop("peft_config", None)
        return network.requires_grad_(True)

    @torch.no_grad()
    def _merged(self, layer: Any, role: str) -> nn.Module:
        """Return a plain layer with the weights of ``role``; copies of all its adapters would need much memory."""
        own = layer.get_base_layer()
        base: Any = copy.deepcopy(self.originals.get(id(own), own)).float()
        if role != TEACHER:
            base.weight += layer.get_delta_weight(role).to(base.weight.device)  # an original layer is on the host
        return base

    def params(self, role: str) -> list[nn.Parameter]:
        return list(self._own(role).values())

    @torch.no_grad()
    def load_or_project(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Give every adapter the best approximation, of its rank, of its layer's difference to the teacher.

        It is the truncated singular value decomposition (Eckart and Young 1936). Differences in layers without
        adapters are lost; there are none if the weights were themselves trained with such adapters. A warning reports
        the lost share of the adapted layers' difference (squared), if it is more than 1 %.
        """
        held, total = 0.0, 0.0
        for name, layer in self.network.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            down, up, own = layer.lora_A[role].weight, layer.lora_B[role].weight, layer.get_base_layer().weight
            # in float32: to a base of 16 bits, the student would be rounded by more than it differs
            difference = weights[f"{name}.weight"].to(own.device, torch.float32) - own.float()
            u, s, vh = torch.linalg.svd(difference.flatten(1), full_matrices=False)
            rank, root = min(len(s), self.rank), s[: self.rank].sqrt()
            down.zero_().flatten(1)[:rank] = root[:, None] * vh[:rank]
            up.zero_().flatten(1)[:, :rank] = u[:, :rank] * root
            held += s[:rank].square().sum().item()
            total += s.square().sum().item()
        if held < 0.99 * total:
            warnings.warn(
                f"bank.init_from: adapters of rank {self.rank} represent {held / total:.0%} of the difference between "
                "the student's layers and the teacher's (squared); a larger bank.rank represents more",
                stacklevel=2,
            )

    def lora_state(self, role: str) -> dict[str, Tensor]:
        """Return the adapter of ``role`` by PEFT's names: ``<layer>.lora_A.weight``, ``<layer>.lora_B.weight``."""
        return {name.replace(f".{role}.", "."): tensor for name, tensor in self.state(role).items()}

    def train(self, mode: bool = True) -> AdapterBank:
        """Keep the shared network in evaluation mode, because its dropout would reach the teacher."""
        self.training = mode
        return self

    def _forget_places(self) -> None:
        """Look for layers and parameters again, because some were added or replaced."""
        self.__dict__.pop("_layers", None)
        self.__dict__.pop("_places", None)

    def _add(self, role: str, from_: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        frozen = {name: p.requires_grad for name, p in self.network.named_parameters()}
        self.network.__dict__.pop("peft_config", None)  # else PEFT warns about the adapters before
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=self.targets, init_lora_weights=True)
        inject_adapter_in_model(config, self.network, adapter_name=role)
        self._forget_places()
        # injection resets which adapters are trainable; only the bank decides that
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(frozen.get(name, False))
        self.network.eval()
        if from_ != TEACHER:
            self.trainable.setdefault(role, False)
            self.blend(role, from_, keep=0.0)

    @functools.cached_property
    def _places(self) -> dict[str, list[tuple[str, nn.Module, str]]]:
        """By role, the parameters' names, their modules and their names there; walking the network takes long."""
        places: dict[str, list[tuple[str, nn.Module, str]]] = {role: [] for role in self.trainable}
        for name, _ in self.network.named_parameters():
            role = name.split(".")[-2] if "lora_" in name else TEACHER
            module, _, leaf = name.rpartition(".")
            places.setdefault(role, []).append((name, self.network.get_submodule(module), leaf))
        return places

    def _own(self, role: str) -> dict[str, nn.Parameter]:
        return {name: getattr(module, leaf) for name, module, leaf in self._places[role]}

    def _pairs(self, dst: str, src: str) -> tuple[list[Tensor], list[Tensor]]:
        targets = self.state(dst)
        if src != TEACHER:
            return list(targets.values()), list(self.state(src).values())
        # the teacher is the adapter whose B is zero, for any A
        up = [tensor for name, tensor in targets.items() if ".lora_B." in name]
        return up, [torch.zeros_like(tensor) for tensor in up]
