"""What a step holds beside weights, gradients and optimiser: an estimate, by running it on tensors without numbers.

torch's fake tensors have shapes and no memory, so a network of any size runs in seconds. What lives at once is counted
over a forward of the student with its graph, the guided teacher's forward beside it, and the backward pass. It is the
count of a CPU's kernels under autocast: a GPU's keep somewhat more or less, and its allocator rounds up.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepdistill.batch import Cond
from stepdistill.methods.base import Distiller
from stepdistill.networks.denoiser import Denoiser
from stepdistill.training.config import TrainConfig
from stepdistill.training.parallelism import HALVES


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made in its context that live at once.

    Args:
        known: tensors whose memory does not count, such as weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in filter(torch.is_tensor, tree_leaves(result)):
            self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def step_peak(student: Denoiser, teacher: Denoiser, x_t: Tensor, cond: Cond, graphs: int = 1) -> int:
    """Return the peak of live bytes of a student's forward, a guided teacher's beside it, and the backward.

    Args:
        student: whose parameters require gradients.
        teacher: called without a graph on twice the batch.
        x_t: states (B, C, ...).
        cond: their condition.
        graphs: how many forwards of the student's size are kept for the backward.
    """
    parameters = [*student.bank.parameters(), *student.bank.buffers()]
    t = torch.full((len(x_t),), 0.5)
    x_t = x_t.requires_grad_(graphs > 1)
    twice = {name: torch.cat([value, value]) for name, value in cond.items()}
    with LiveBytes([*parameters, x_t, t, *cond.values(), *twice.values()]) as counted:
        outputs = [student.raw(x_t, t, cond) for _ in range(graphs)]
        with torch.no_grad():
            teacher.raw(torch.cat([x_t, x_t]), torch.cat([t, t]), twice)
        loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        torch.autograd.grad(loss, student.bank.params(student.role), allow_unused=True)
    return counted.peak


def activations(distiller: Distiller, config: TrainConfig, batch_size: int) -> float:
    """Return the megabytes that a step of the student's turn holds at its peak, gradients of its weights included.

    A critic that reads a network's features is taken to keep a second graph of the student's size.
    """
    family, bank = distiller.family, distiller.bank
    if config.gradient_checkpointing:
        bank.enable_checkpointing()
    shapes = {name: (batch_size, *value.shape[1:]) for name, value in family.example_cond([0]).items()}
    dtypes = {name: value.dtype for name, value in family.example_cond([0]).items()}
    half = HALVES.get(config.precision)
    with FakeTensorMode(allow_non_fake_inputs=True), without_numbers(bank.distinct_networks(), bank.originals):
        cond = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
        x_t = torch.empty(batch_size, *family.sample_shape)
        with torch.autocast("cpu", half, enabled=half is not None):
            peak = step_peak(distiller.student, distiller.teacher, x_t, cond, graphs_of(distiller))
    return peak / 1e6


def graphs_of(distiller: Distiller) -> int:
    """Return how many graphs of the student's size its turn keeps, at most: one, and that of a critic's features."""
    return 1 + any(turn.name == "critic" or turn.head for turn in distiller.turns.values())


@contextlib.contextmanager
def without_numbers(networks: Iterable[nn.Module], originals: Mapping[int, nn.Module]) -> Iterator[None]:
    """Have all weights of networks as tensors without numbers on the CPU, made in the present mode, in the context.

    Args:
        networks: the networks.
        originals: layers as they were before quantisation, by the ``id`` of the present ones, whose place they take.
    """
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    made: dict[int, Tensor] = {}
    try:
        for network in networks:
            for module in list(network.modules()):
                _replace(before, module._modules, lambda child: originals.get(id(child), child))
            for module in network.modules():
                for own in (module._parameters, module._buffers):
                    _replace(before, own, lambda tensor: made.setdefault(id(tensor), _like(tensor)))
        yield
    finally:
        for own, values in reversed(before):
            own.update(values)


def _replace(before: list[tuple[dict, dict]], own: dict[str, Any], new: Callable[[Any], Any]) -> None:
    """Replace what there is in a module's dictionary, and note how it was."""
    before.append((own, dict(own)))
    for name, value in own.items():
        if value is not None:
            own[name] = new(value)


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if type(tensor) is nn.Parameter or tensor.requires_grad:
        return nn.Parameter(empty, tensor.requires_grad)
    return empty
