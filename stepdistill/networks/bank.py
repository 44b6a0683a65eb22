"""A bank of networks that play roles, under one of two memory policies.

A distillation method trains and calls *roles*: a teacher, a student, an average of it, a fake score. Either every role
is a full copy of the network (:class:`~stepdistill.networks.copy_bank.CopyBank`), or there is one frozen network with
an adapter per role (:class:`~stepdistill.networks.adapter_bank.AdapterBank`, LoRA: Hu et al. 2021, arXiv 2106.09685).
Methods do not know which.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stepdistill.families.visiting import hold_on_host, visiting
from stepdistill.networks.activation_checkpointing import enable_checkpointing, in_training
from stepdistill.networks.averaging import blend_tensors
from stepdistill.networks.compilation import compile_blocks
from stepdistill.networks.sharding import assembled, blueprint, local, shard, write

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STUDENT, EMA, TEACHER = "student", "ema", "teacher"


class NetworkBank(nn.Module, abc.ABC):
    """Networks by role. The role ``"teacher"`` always exists, is frozen, and never changes.

    Gradient checkpointing recomputes a block during the backward pass, under whichever role is active *then*. Nothing
    fails if that is another role than in the forward pass, or another mode, but the gradient is wrong. The
    recomputation therefore runs under the role and mode of its forward pass, see :meth:`enable_checkpointing`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trainable: dict[str, bool] = {TEACHER: False}
        self.blueprints: dict[nn.Module, nn.Module] = {}
        """For each sharded network, a copy from before without its weights."""
        self.scales: dict[str, float] = {}
        """How often the adapter of a role counts, where it is not once."""
        self.originals: dict[int, nn.Module] = {}
        """Layers as they were before quantisation, by the ``id`` of the present one; :meth:`extract` copies these."""

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles, the teacher first."""
        return tuple(self.trainable)

    def fork(self, role: str, from_: str = TEACHER, *, trainable: bool = True) -> None:
        """Add ``role`` with the weights of ``from_``; roles that are not trainable stay in evaluation mode."""
        assert role not in self.trainable, f"role {role!r} exists"
        assert from_ in self.trainable, f"no role {from_!r} to fork from"
        self._add(role, from_)
        self.trainable[role] = trainable
        for parameter in self.params(role):
            # single precision at least, for any precision of the teacher
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(trainable)

    @abc.abstractmethod
    def params(self, role: str) -> list[nn.Parameter]:
        """Return the parameters that belong to ``role`` alone, in a fixed order."""

    def state(self, role: str) -> dict[str, Tensor]:
        """Return the tensors that belong to ``role`` alone, by name; writing into them changes the role."""
        return {name: tensor.detach() for name, tensor in self._own(role).items()}

    @torch.no_grad()
    def load(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Write tensors over those of ``role``, by the names of :meth:`state`."""
        own = self.state(role)
        assert own.keys() == weights.keys(), "the tensors are not those of the role"
        for name, tensor in own.items():
            write(tensor, weights[name])

    @abc.abstractmethod
    def load_or_project(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Give ``role`` these weights of a plain network, exactly or as closely as the role can represent them."""

    @torch.no_grad()
    def blend(self, dst: str, src: str, keep: float) -> None:
        """``dst <- keep dst + (1 - keep) src``: ``keep`` = 0 copies, 0.999 is a step of an average."""
        assert dst != TEACHER, "the teacher never changes"
        targets, sources = [], []
        for target, source in zip(*map(local, self._pairs(dst, src)), strict=True):
            if target.is_floating_point():
                targets.append(target)
                sources.append(source)
            else:
                target.copy_(source)
        blend_tensors(targets, sources, keep)

    def hold_on_host(self, role: str) -> None:
        """Hold a role that is no turn's in the host's memory: it can be blended, and used :meth:`beside_teacher`."""
        hold_on_host(self._own(role).values())

    def beside_teacher(self, role: str) -> contextlib.AbstractContextManager[None]:
        """Return a context in which a role is on the teacher's device, wherever it is held."""
        return visiting(self._own(role).values(), self.params(TEACHER)[0].device)

    @abc.abstractmethod
    def using(self, role: str) -> contextlib.AbstractContextManager[nn.Module]:
        """Yield the network in ``role``; inside the context it plays that role, and contexts may be nested."""

    def scale(self, role: str, factor: float) -> None:
        """Let the adapter of ``role`` count ``factor`` times from now on.

        Raises:
            ValueError: if the roles are no adapters.
        """
        del factor
        raise ValueError(f"bank.name: expected 'adapter', because the {role} is an adapter that is scaled, got 'copy'")

    @contextlib.contextmanager
    def scaled(self, role: str, factor: float) -> Iterator[None]:
        """Let the adapter of ``role`` count ``factor`` times inside the context; see :meth:`scale`."""
        before = self.scales.get(role, 1.0)
        self.scale(role, factor)
        try:
            yield
        finally:
            self.scale(role, before)

    @abc.abstractmethod
    def extract(self, role: str) -> nn.Module:
        """Return a stand-alone copy of the network in ``role``, a plain diffusers model with merged adapters.

        For sharded networks all processes must call it, and the main one receives the weights.
        """

    @abc.abstractmethod
    def distinct_networks(self) -> list[Any]:
        """Return the modules that play the roles: one per role, or one for all of them."""

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Raises:
            ValueError: if the network's class has no gradient checkpointing.
        """
        for network in self.distinct_networks():
            enable_checkpointing(network, functools.partial(self._recomputation, network))

    def enable_compilation(self, backend: Any = "inductor") -> None:
        """Compile the repeated blocks of every network, so that a role's first call takes longer and its others less.

        Raises:
            ValueError: if a network has no blocks that are known to repeat, or is divided among processes.
        """
        if self.blueprints:
            raise ValueError("train.compile: expected false for networks that are divided among processes, got true")
        for network in self.distinct_networks():
            compile_blocks(network, "train.compile", backend)

    def _recomputation(
        self, network: nn.Module
    ) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """Contexts of a checkpointed block's forward and of its recomputation, which has the same dropout or none."""
        return contextlib.nullcontext(), in_training(network, network.training)

    def lora_state(self, role: str) -> dict[str, Tensor] | None:
        """Return the adapter of ``role`` as PEFT names it in files; None if the roles are no adapters."""
        del role
        return None

    def shard(self, mesh: DeviceMesh) -> None:
        """Split every network over the processes of ``mesh``, in place. No role can be added afterwards."""
        for network in self.distinct_networks():
            self.blueprints[network] = blueprint(network, {id(self): self})
            shard(network, mesh)

    def _copy(self, network: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
        """Copy one network, but not this bank, which a network with gradient checkpointing refers to.

        If it is not sharded, the modules of ``replaced``, by the ``id`` of the present ones, stand in their places.
        """
        if network in self.blueprints:
            return assembled(self.blueprints[network], network, {id(self): self})
        return copy.deepcopy(network, {id(self): self, **replaced})

    @abc.abstractmethod
    def _add(self, role: str, from_: str) -> None: ...

    @abc.abstractmethod
    def _own(self, role: str) -> Mapping[str, Tensor]: ...

    @abc.abstractmethod
    def _pairs(self, dst: str, src: str) -> tuple[list[Tensor], list[Tensor]]: ...
