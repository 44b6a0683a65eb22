"""Sharded training of a distiller (FSDP2)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stepdistill.networks.sharding import is_share, whole

if TYPE_CHECKING:
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
