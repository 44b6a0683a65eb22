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
    """Whether the launcher asked for sharding, and there is more than one process.

    Raises:
        ValueError: for what this project does not support: FSDP1, offloaded parameters, DeepSpeed, Megatron.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate: distributed_type {accelerator.distributed_type.value} is not supported; expected MULTI_GPU, "
            "or FSDP with fsdp_version: 2 (configs/accelerate)"
        )
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"accelerate: fsdp_version: expected 2, got {version} (configs/accelerate/fsdp2.yaml)")
    for name in ("offload_params", "cpu_ram_efficient_loading", "activation_checkpointing"):
        if parse_flag_from_env(f"FSDP_{name.upper()}"):
            raise ValueError(f"accelerate: fsdp_{name}: expected false, got true (configs/accelerate/fsdp2.yaml)")
    return accelerator.num_processes > 1


def shard_bank(distiller: Distiller, accelerator: Accelerator) -> None:
    """Shard a distiller's networks in place, and give its turns the parameters that replace the old ones.

    What a method trains besides the bank (heads, a weight) is small and stays whole in every process: see
    :func:`average_gradients`.
    """
    from torch.distributed.device_mesh import init_device_mesh

    before = dict(distiller.named_parameters())
    distiller.bank.shard(init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
    after = dict(distiller.named_parameters())
    replacements = {id(parameter): after[name] for name, parameter in before.items()}
    for name, turn in distiller.turns.items():
        params = [replacements[id(parameter)] for parameter in turn.params]
        head = [replacements[id(parameter)] for parameter in turn.head]
        distiller.turns[name] = dataclasses.replace(turn, params=params, head=head)


def average_gradients(params: Sequence[nn.Parameter]) -> None:
    """Average over processes the gradients of whole parameters, as sharding does for the others."""
    for parameter in params:
        if parameter.grad is not None and not is_share(parameter):
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


def clip_gradients(params: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients to a norm of at most ``limit``, and return the norm they had, over shards and whole ones."""
    groups = split_shards([parameter for parameter in params if parameter.grad is not None])
    norms = []
    for group in groups:
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        norms.append(whole(get_total_norm(gradients)))
    norm = torch.stack(norms).norm()
    for group in groups:
        clip_grads_with_norm_(group, limit, norm)
    return norm


def split_shards(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters into shards and whole ones, because one kernel of an optimiser cannot take both."""
    shards: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in params:
        (shards if is_share(parameter) else others).append(parameter)
    return [group for group in (shards, others) if group]
