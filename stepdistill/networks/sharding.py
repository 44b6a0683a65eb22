"""Sharded training: every network of a bank split over all processes, block by block (FSDP2, ``fully_shard``).

``accelerate launch --config_file configs/accelerate/fsdp2.yaml`` turns it on. Each process then holds its share of
every parameter and of its optimiser's state, and a whole block only while that block runs. A run computes the same as
one process would, and its checkpoints and exports contain whole tensors.

No process can run or read a sharded network alone: all of them sample, save and export together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from stepdistill.pipelines.condition_embedding import ConditionEmbedding

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network in place: the members of its lists of blocks one by one, and the rest as a whole.

    Modules that embed further inputs are called outside the network, and are therefore not sharded.
    """
    from torch.distributed.fsdp import fully_shard

    for child in network.children():
        for block in members(child):
            fully_shard(block, mesh=mesh)
    kept = set()
    for module in network.modules():
        if isinstance(module, ConditionEmbedding):
            kept.update(module.parameters())
    # reshard directly after a forward pass, or weights that are read after sampling are no shares
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=kept)


def members(module: nn.Module) -> list[nn.Module]:
    """Return the members of a ``ModuleList``; no other module has any."""
    return list(module) if isinstance(module, nn.ModuleList) else []


def blueprint(network: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a copy of a network without its weights, from which :func:`assembled` copies it once it is sharded."""
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, memo)


def assembled(plain: nn.Module, network: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return an unsharded copy of a sharded network, on the CPU of the main process; elsewhere it has no weights."""
    tensors = gathered(dict([*network.named_parameters(), *network.named_buffers()]), keep=is_main())
    # copies, because tensors that were never sharded are the network's own
    whole = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    for name, parameter in plain.named_parameters():
        if name in whole:
            memo[id(parameter)] = nn.Parameter(whole[name], parameter.requires_grad)
    for name, buffer in plain.named_buffers():
        if name in whole:
            memo[id(buffer)] = whole[name]
    return copy.deepcopy(plain, memo)


def is_main() -> bool:
    """Return whether this is the process that writes files."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def is_share(tensor: Tensor) -> bool:
    """Return whether a tensor is this process's share of a larger one."""
    if not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor  # a slow import that a single process does not need

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor that a share belongs to, and any other tensor itself; all processes must call it."""
    return cast(Any, tensor).full_tensor() if is_share(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return whole tensors, put together on the CPU; without ``keep``, this process only contributes its shares."""
    found = {}
    for name, tensor in sorted(tensors.items()):  # in the same order in all processes
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu() if is_share(tensor) else full
    return found


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which all processes have, into one that may be a share."""
    if is_share(target):
        from torch.distributed.tensor import distribute_tensor

        share, value = cast(Any, target), value.to(target.device, target.dtype)
        # without a source rank every process cuts its own share
        value = distribute_tensor(value, share.device_mesh, share.placements, src_data_rank=None)
    target.copy_(value)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """Return this process's shares, for operations on single elements."""
    return [cast(Any, tensor).to_local() if is_share(tensor) else tensor for tensor in tensors]
