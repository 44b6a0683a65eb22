"""The state of an optimiser as named tensors, saved and restored bit for bit.

Only the optimiser knows the form of its state: moments may lie in other layouts than their parameters, in 8 bits with
scales beside them, or in plain numbers. So it makes that form itself before it is filled, in a step without effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepdistill.networks.sharding import is_share, write
from stepdistill.training.checkpoint import CheckpointError

_STATELESS = "stateless"
"""Indices of the parameters that an optimiser has not stepped yet."""


_ITEM = ".item"
"""Suffix of a Python number among an optimiser's tensors."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's state as ``"<parameter index>.<name>" -> tensor``, for :func:`restore_optimizer`.

    A moment in few bits becomes the tensors that it holds, ``"<index>.<name>.<part>"``, and Python numbers become 0-d
    tensors named ``"<index>.<name>.item"``. Parameters without state are listed under ``"stateless"``, which tells an
    entry that is absent on purpose from a missing one. Learning rates are not included.
    """
    tensors: dict[str, Tensor] = {}
    stateless = []
    for index, parameter in enumerate(_parameters(optimizer)):
        entries = optimizer.state.get(parameter)
        if not entries:
            stateless.append(index)
            continue
        for name, value in entries.items():
            if torch.is_tensor(value):
                tensors |= held_tensors(f"{index}.{name}", value.detach())
            else:
                dtype = torch.float64 if type(value) is float else None
                tensors[f"{index}.{name}{_ITEM}"] = torch.tensor(value, dtype=dtype)
    if stateless:
        tensors[_STATELESS] = torch.tensor(stateless)
    return tensors


def held_tensors(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a tensor by its name, or if it is in few bits, the tensors that it holds by theirs."""
    if is_share(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    parts, _ = tensor.__tensor_flatten__()
    return {f"{name}.{part}": getattr(tensor, part) for part in parts}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that :func:`optimizer_tensors` returned, so that training continues bit for bit.

    The tensors are copied in the memory layout of the optimiser's own: fused kernels read them and their parameters in
    memory order, and would silently pair the wrong elements of a ``channels_last`` weight.

    Raises:
        CheckpointError: naming the first entry that is missing, of the wrong shape, or without a parameter.
    """
    parameters = _parameters(optimizer)
    stateless = {*(tensors[_STATELESS].tolist() if _STATELESS in tensors else [])}
    make_state(optimizer, [parameter for index, parameter in enumerate(parameters) if index not in stateless])
    own = optimizer_tensors(optimizer)
    try:
        _check(own, tensors, len(parameters))
    except CheckpointError:
        optimizer.state.clear()
        raise
    for key in own.keys() - {_STATELESS}:
        if not key.endswith(_ITEM):
            write(own[key], tensors[key])
            continue
        index, _, name = key.removesuffix(_ITEM).partition(".")
        optimizer.state[parameters[int(index)]][name] = tensors[key].item()


def make_state(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """Have the optimiser make its state of these parameters, by a step at the rate 0 that moves no bit of them."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], count: int) -> None:
    """Check that there are the entries that the optimiser has, in their shapes, and nothing else."""
    for key, tensor in own.items():
        if key not in tensors:
            raise CheckpointError(f"optimizer entry {key!r} is missing (expected one of shape {tuple(tensor.shape)})")
        if key != _STATELESS and (stored := tensors[key].shape) != tensor.shape:
            raise CheckpointError(f"optimizer entry {key!r} has shape {tuple(stored)}, expected {tuple(tensor.shape)}")
    if surplus := sorted(tensors.keys() - own.keys()):
        raise CheckpointError(f"optimizer entry {surplus[0]!r} belongs to none of the {count} parameters")
