"""Sharded training: every network of a bank split over all processes, block by block (FSDP2, ``fully_shard``).

``accelerate launch --config_file configs/accelerate/fsdp2.yaml`` asks for it. Each process then holds its share of
every parameter and of its optimiser's state, and sees a block whole only while that block runs. What a run computes,
and what its checkpoints and exports hold, is what one process would have made of it: a checkpoint knows nothing of
shares.

A process can neither run nor read a sharded network alone: what is sampled, saved or exported is so by all together.
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
    """Shard a network in place: the members of its lists of blocks one by one, and what is left as a whole.

    What embeds further inputs is called beside the network, and so stays whole.
    """
    from torch.distributed.fsdp import fully_shard

    for child in network.children():
        for block in child if isinstance(child, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    beside = [module for module in network.modules() if isinstance(module, ConditionEmbedding)]
    kept = {parameter for module in beside for parameter in module.parameters()}
    # at once after a forward, or weights that are read after sampling would be no shares
    fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=kept)


def blueprint(network: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a network without its weights, which a sharded one cannot give any more; see :func:`assembled`."""
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, memo)


def assembled(plain: nn.Module, network: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a sharded network as it was before, on the CPU of the main process; elsewhere it has no weights."""
    tensors = gathered(dict([*network.named_parameters(), *network.named_buffers()]), keep=is_main())
    for name, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
        if name in tensors:
            memo[id(tensor)] = _like(tensor, tensors[name])
    return copy.deepcopy(plain, memo)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    value = value.detach().to("cpu", copy=True)  # what was whole all along is the network's own
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def is_share(tensor: Tensor) -> bool:
    """Whether a tensor is this process's share of a larger one."""
    if not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor  # a slow import, which one process has no need of

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, where it is a share the whole of it: all processes have to ask."""
    return cast(Any, tensor).full_tensor() if is_share(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The whole of each tensor, shares put together on the CPU; without ``keep`` this process only gives its shares."""
    found = {}
    for name, tensor in sorted(tensors.items()):  # in one order in all processes
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu() if is_share(tensor) else full
    return found


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same in all processes, into one that may be a share."""
    if is_share(target):
        from torch.distributed.tensor import distribute_tensor

        share, value = cast(Any, target), value.to(target.device, target.dtype)
        # without a source rank every process cuts its own share
        value = distribute_tensor(value, share.device_mesh, share.placements, src_data_rank=None)
    target.copy_(value)


def local(tensors: list[Tensor]) -> list[Tensor]:
    """This process's shares, for what is done element by element."""
    return [cast(Any, tensor).to_local() if is_share(tensor) else tensor for tensor in tensors]
