"""Sharded training: every network of a bank split over all processes, block by block (FSDP2, ``fully_shard``).

``accelerate launch --config_file configs/accelerate/fsdp2.yaml`` asks for it. Each process then holds its share of
every parameter and of its optimiser's state, and sees a block whole only while that block runs. What a run computes,
and what its checkpoints and exports hold, is what one process would have made of it: a checkpoint knows nothing of
shares.

A process can neither run nor read a sharded network alone: what is sampled, saved or exported is so by all together.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stepdistill.pipelines.condition_embedding import ConditionEmbedding

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from stepdistill.methods.base import Distiller


def is_wanted(accelerator: Accelerator) -> bool:
    """Whether the launcher asked for sharding, and there are processes to share.

    Raises:
        ValueError: for what this project does not train with: FSDP1, offloaded parameters, DeepSpeed, Megatron.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate: distributed_type {accelerator.distributed_type.value} is not supported; wanted MULTI_GPU, or "
            "FSDP with fsdp_version: 2 (configs/accelerate)"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"accelerate: fsdp_version: found {version}, wanted 2 (configs/accelerate/fsdp2.yaml)")
    for name in ("offload_params", "cpu_ram_efficient_loading", "activation_checkpointing"):
        if parse_flag_from_env(f"FSDP_{name.upper()}"):
            raise ValueError(f"accelerate: fsdp_{name}: found true, wanted false (configs/accelerate/fsdp2.yaml)")
    return accelerator.num_processes > 1


def shard_bank(distiller: Distiller, accelerator: Accelerator) -> None:
    """Shard a distiller's networks in place, and let its turns hold the parameters that stand for the old ones.

    What a method trains beside the bank (heads, a weight) is small and stays whole in every process: see :func:`agree`.
    """
    from torch.distributed.device_mesh import init_device_mesh

    before = dict(distiller.named_parameters())
    distiller.bank.shard(init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
    after = dict(distiller.named_parameters())
    place = {id(parameter): after[name] for name, parameter in before.items()}
    for name, turn in distiller.turns.items():
        params = [place[id(parameter)] for parameter in turn.params]
        distiller.turns[name] = dataclasses.replace(turn, params=params)


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


def agree(params: Sequence[nn.Parameter]) -> None:
    """Average over processes the gradients of what is not sharded, as sharding does for the rest."""
    for parameter in params:
        if parameter.grad is not None and not is_share(parameter):
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


def clip_gradients(params: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most ``limit``; returns the norm they had, over shares and what is whole."""
    kinds = [group for group in by_kind(params) if any(parameter.grad is not None for parameter in group)]
    norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in kinds]
    norm = torch.stack([whole(part) for part in norms]).norm()
    for group in kinds:
        clip_grads_with_norm_(group, limit, norm)
    return norm


def by_kind(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Shares, and what is whole: one kernel of an optimiser takes either, and not both at once."""
    kinds = [[p for p in params if is_share(p)], [p for p in params if not is_share(p)]]
    return [group for group in kinds if group]


def local(tensors: list[Tensor]) -> list[Tensor]:
    """This process's shares, for what is done element by element."""
    return [cast(Any, tensor).to_local() if is_share(tensor) else tensor for tensor in tensors]
