"""The state of an optimiser as named tensors, saved and restored bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepdistill.networks.sharding import write
from stepdistill.training.checkpoint import CheckpointError

_STATELESS = "stateless"
"""Indices of the parameters that an optimiser has not stepped yet."""


_ITEM = ".item"
"""Suffix of a Python number among an optimiser's tensors."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's state as ``"<parameter index>.<name>" -> tensor``, for :func:`restore_optimizer`.

    Python numbers become 0-d tensors named ``"<index>.<name>.item"``. Parameters without state are listed under
    ``"stateless"``, which tells an entry that is absent on purpose from a missing one. Learning rates are not included.

    Raises:
        CheckpointError: if an entry is neither a scalar nor of its parameter's shape (Adafactor).
    """
    states, tensors = optimizer.state_dict()["state"], {}
    for index, entries in states.items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach()
            else:
                dtype = torch.float64 if isinstance(value, float) else None
                tensors[f"{index}.{name}{_ITEM}"] = torch.tensor(value, dtype=dtype)
    parameters = _parameters(optimizer)
    if stateless := [index for index in range(len(parameters)) if not states.get(index)]:
        tensors[_STATELESS] = torch.tensor(stateless)
    _check_entries(parameters, tensors)
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that :func:`optimizer_tensors` returned, so that training continues bit for bit.

    The tensors are copied in the memory layout of their parameters: fused kernels read both in memory order, and would
    silently pair the wrong elements of a ``channels_last`` weight.

    Raises:
        CheckpointError: naming the first entry that is missing, of the wrong shape, or without a parameter.
    """
    parameters = _parameters(optimizer)
    _check_entries(parameters, tensors)
    states: dict[int, dict[str, Any]] = {}
    for key in tensors.keys() - {_STATELESS}:
        number, _, name = key.partition(".")
        index = int(number)
        states.setdefault(index, {})[name.removesuffix(_ITEM)] = _restored(name, tensors[key], parameters[index])
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    for index, entries in states.items():
        for name, value in entries.items():
            placed = optimizer.state[parameters[index]]
            if isinstance(value, Tensor):  # torch has rounded it to its parameter's dtype
                placed[name] = value.to(placed[name].device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _restored(name: str, value: Tensor, parameter: Tensor) -> Tensor | float:
    if name.endswith(_ITEM):
        return value.item()
    if value.ndim == 0:
        return value.clone()
    restored = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    write(restored, value)
    return restored


def _check_entries(parameters: list[Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Check that every stepped parameter has the same entries, scalars or of its shape, and nothing else exists."""
    stateless = tensors[_STATELESS].tolist() if _STATELESS in tensors else []
    names = sorted({key.partition(".")[2] for key in tensors.keys() - {_STATELESS}}) or ["*"]
    expected = {}
    for index, parameter in enumerate(parameters):
        if index not in stateless:
            for name in names:
                expected[f"{index}.{name}"] = parameter.shape
    for key, shape in expected.items():
        if key not in tensors:
            raise CheckpointError(f"optimizer entry {key!r} is missing (its parameter has shape {tuple(shape)})")
        if (stored := tensors[key].shape) not in (shape, torch.Size()):
            raise CheckpointError(f"optimizer entry {key!r} has shape {tuple(stored)}, its parameter {tuple(shape)}")
    if surplus := sorted(tensors.keys() - expected.keys() - {_STATELESS}):
        raise CheckpointError(f"optimizer entry {surplus[0]!r} belongs to none of the {len(parameters)} parameters")
