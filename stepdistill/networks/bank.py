"""Who owns which weights: one bank of networks that play roles, under one of two memory policies.

A distillation method speaks of a teacher, a student, an average of it, a mentor, a fake score, ...: *roles*. Whether a
role is a full copy of the network (:class:`CopyBank`) or one frozen network with an adapter per role
(:class:`AdapterBank`, LoRA: Hu et al. 2021, arXiv 2106.09685) is decided here and nowhere else.

Two hazards are absorbed here, because neither raises an error when it strikes (tests/test_networks.py):

- PEFT's ``set_adapter`` flips ``requires_grad``; called between a forward and its backward it zeroes the gradient of
  the adapter that was used. :meth:`AdapterBank.using` changes only which adapter is *active*.
- Gradient checkpointing recomputes a block at backward time, under whichever role is active *then*. The recomputation
  is therefore run under the role of its forward, see :meth:`NetworkBank.enable_checkpointing`.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.networks.activation_checkpointing import enable_checkpointing, without_checkpointing
from stepdistill.networks.sharding import assembled, blueprint, local, shard, write

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


STUDENT, EMA = "student", "ema"


TEACHER = "teacher"


class NetworkBank(nn.Module, abc.ABC):
    """Networks by role. The role ``"teacher"`` is always there, frozen, and never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.trainable: dict[str, bool] = {TEACHER: False}
        self.blueprints: dict[nn.Module, nn.Module] = {}
        """By network, where they are sharded: what it was before, without its weights."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles there are, the teacher first."""
        return tuple(self.trainable)

    def fork(self, role: str, from_: str = TEACHER, *, trainable: bool = True) -> None:
        """Add ``role`` with the weights of ``from_``; frozen roles (averages, mentors) stay in eval mode."""
        assert role not in self.trainable, f"role {role!r} exists"
        assert from_ in self.trainable, f"no role {from_!r} to fork from"
        self._add(role, from_)
        self.trainable[role] = trainable
        for parameter in self.params(role):
            # single precision at least, whatever the teacher's
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(trainable)

    def params(self, role: str) -> list[nn.Parameter]:
        """The parameters that belong to ``role`` alone, in a fixed order."""
        return [tensor for tensor in self._own(role).values() if isinstance(tensor, nn.Parameter)]

    def state(self, role: str) -> dict[str, Tensor]:
        """The tensors that belong to ``role`` alone, by name; writing into them changes the role."""
        return {name: tensor.detach() for name, tensor in self._own(role).items()}

    @torch.no_grad()
    def load(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Write tensors over those of ``role``, by the names of :meth:`state`."""
        own = self.state(role)
        assert own.keys() == weights.keys(), "other tensors than the role's"
        for name, tensor in own.items():
            write(tensor, weights[name])

    @abc.abstractmethod
    def load_or_project(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Make ``role`` the network of these weights, named as a plain network names them, as nearly as it can be."""

    @torch.no_grad()
    def blend(self, dst: str, src: str, keep: float) -> None:
        """``dst <- keep dst + (1 - keep) src``: ``keep`` = 0 copies, 0.999 is a step of an average."""
        assert dst != TEACHER, "the teacher never changes"
        targets, sources = (local(side) for side in self._pairs(dst, src))
        floating = [i for i, target in enumerate(targets) if target.is_floating_point()]
        for i in set(range(len(targets))) - set(floating):
            targets[i].copy_(sources[i])
        targets, sources = [targets[i] for i in floating], [sources[i] for i in floating]
        if keep == 0:
            torch._foreach_copy_(targets, sources)
        else:
            torch._foreach_lerp_(targets, sources, 1 - keep)

    @abc.abstractmethod
    def using(self, role: str) -> contextlib.AbstractContextManager[nn.Module]:
        """The network playing ``role``, for as long as the context lasts; contexts may nest."""

    @abc.abstractmethod
    def extract(self, role: str) -> nn.Module:
        """A stand-alone copy of the network playing ``role``, a plain diffusers model (adapters merged).

        Of sharded networks all processes have to ask, and the main one gets the weights.
        """

    @abc.abstractmethod
    def distinct_networks(self) -> list[Any]:
        """The modules that play the roles: one a role, or one for all of them."""

    def enable_checkpointing(self) -> None:
        """Recompute activations at backward instead of keeping them, under the role that was active at forward.

        Raises:
            ValueError: if the network's class has no gradient checkpointing.
        """
        for network in self.distinct_networks():
            enable_checkpointing(network, self._recomputation)

    def _recomputation(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """Contexts of a checkpointed block's forward and of its recomputation."""
        return contextlib.nullcontext(), contextlib.nullcontext()

    def shard(self, mesh: DeviceMesh) -> None:
        """Split every network over the processes of ``mesh``, in place. No role can be added afterwards."""
        for network in self.distinct_networks():
            self.blueprints[network] = blueprint(network, {id(self): self})
            shard(network, mesh)

    def _copy(self, network: nn.Module) -> nn.Module:
        """A copy of one network: where it recomputes activations it holds this bank, which is not copied with it."""
        if network in self.blueprints:
            return assembled(self.blueprints[network], network, {id(self): self})
        return copy.deepcopy(network, {id(self): self})

    @abc.abstractmethod
    def _add(self, role: str, from_: str) -> None: ...

    @abc.abstractmethod
    def _own(self, role: str) -> dict[str, Tensor]: ...

    @abc.abstractmethod
    def _pairs(self, dst: str, src: str) -> tuple[list[Tensor], list[Tensor]]: ...


class CopyBank(NetworkBank):
    """A full copy of the network for every role."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({TEACHER: network.requires_grad_(False).eval()})

    @contextlib.contextmanager
    def using(self, role: str) -> Iterator[nn.Module]:
        yield self.networks[role]

    def distinct_networks(self) -> list[Any]:
        return list(self.networks.values())

    def extract(self, role: str) -> nn.Module:
        return without_checkpointing(self._copy(self.networks[role])).requires_grad_(True)

    def load_or_project(self, role: str, weights: Mapping[str, Tensor]) -> None:
        self.load(role, weights)

    def train(self, mode: bool = True) -> CopyBank:
        """Training mode for trainable roles only: no dropout in a target, mentor or teacher."""
        self.training = mode
        for role, network in self.networks.items():
            network.train(mode and self.trainable[role])
        return self

    def _add(self, role: str, from_: str) -> None:
        self.networks[role] = self._copy(self.networks[from_])

    def _own(self, role: str) -> dict[str, Tensor]:
        network = self.networks[role]
        return dict([*network.named_parameters(), *network.named_buffers()])

    def _pairs(self, dst: str, src: str) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.state(dst).values()), list(self.state(src).values())


class AdapterBank(NetworkBank):
    """One frozen network and one LoRA adapter per role; the teacher is the network with its adapters off.

    Args:
        network: the teacher, which gets adapter layers in place and keeps its weights.
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
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = [role], role == TEACHER
        try:
            yield self.network
        finally:
            for layer, (active, disabled) in zip(self._layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled

    def distinct_networks(self) -> list[Any]:
        return [self.network]

    def _recomputation(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        layer = self._layers[0]
        role = TEACHER if layer._disable_adapters else layer._active_adapter[0]
        return contextlib.nullcontext(), self.using(role)

    def extract(self, role: str) -> nn.Module:
        network = without_checkpointing(self._copy(self.network)).float()
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
    def load_or_project(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Of every adapted layer's difference to the teacher, the best of the adapters' rank (Eckart and Young 1936).

        What differs in other layers stays the teacher's: a student that had such adapters itself is imitated wholly.
        A warning tells how much of the adapted layers' difference is lost, if more than 1 %.
        """
        held, wanted = 0.0, 0.0
        for name, layer in self.network.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            down, up, own = layer.lora_A[role].weight, layer.lora_B[role].weight, layer.get_base_layer().weight
            difference = weights[f"{name}.weight"].to(own).float() - own.float()
            u, s, vh = torch.linalg.svd(difference.flatten(1), full_matrices=False)
            rank, root = min(len(s), self.rank), s[: self.rank].sqrt()
            down.zero_().flatten(1)[:rank] = root[:, None] * vh[:rank]
            up.zero_().flatten(1)[:, :rank] = u[:, :rank] * root
            held, wanted = held + s[:rank].square().sum().item(), wanted + s.square().sum().item()
        if held < 0.99 * wanted:
            warnings.warn(
                f"bank.init_from: adapters of rank {self.rank} hold {held / wanted:.0%} of what the student's layers "
                "differ by from the teacher's (squared); a larger bank.rank holds more",
                stacklevel=2,
            )

    def lora_state(self, role: str) -> dict[str, Tensor]:
        """The adapter of ``role`` as PEFT names it in files: ``<layer>.lora_A.weight``, ``<layer>.lora_B.weight``."""
        return {name.replace(f".{role}.", "."): tensor for name, tensor in self.state(role).items()}

    def train(self, mode: bool = True) -> AdapterBank:
        """The shared network stays in eval mode: its dropout would reach the teacher."""
        self.training = mode
        return self

    def _add(self, role: str, from_: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        frozen = {name: p.requires_grad for name, p in self.network.named_parameters()}
        self.network.__dict__.pop("peft_config", None)  # PEFT's note of the last adapter, about which it would warn
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=self.targets, init_lora_weights=True)
        inject_adapter_in_model(config, self.network, adapter_name=role)
        self.__dict__.pop("_layers", None)
        # injection decides anew which adapters train; the bank alone decides that
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(frozen.get(name, False))
        self.network.eval()
        if from_ != TEACHER:
            self.trainable.setdefault(role, False)
            self.blend(role, from_, keep=0.0)

    def _own(self, role: str) -> dict[str, Tensor]:
        if role == TEACHER:
            return {name: tensor for name, tensor in self.network.named_parameters() if "lora_" not in name}
        marker = f".{role}."
        return {name: tensor for name, tensor in self.network.named_parameters() if marker in name and "lora_" in name}

    def _pairs(self, dst: str, src: str) -> tuple[list[Tensor], list[Tensor]]:
        targets = self.state(dst)
        if src != TEACHER:
            return list(targets.values()), list(self.state(src).values())
        # the teacher is the adapter whose B is zero, whatever its A
        up = [tensor for name, tensor in targets.items() if ".lora_B." in name]
        return up, [torch.zeros_like(tensor) for tensor in up]
