"""Training and evaluation mode of single roles, and their precision, for the length of a block."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from stepdistill.networks.activation_checkpointing import in_training, is_checkpointed
from stepdistill.networks.bank import STUDENT, NetworkBank
from stepdistill.networks.compilation import is_compiled
from stepdistill.networks.sharding import is_share


@contextlib.contextmanager
def in_mode(bank: NetworkBank, role: str, *, training: bool) -> Iterator[None]:
    """Put the network of ``role`` into training or evaluation mode, and back afterwards."""
    with bank.using(role) as network:
        mode = in_training(network, training)
    with mode:
        yield


@contextlib.contextmanager
def shared_dropout(bank: NetworkBank, role: str) -> Iterator[None]:
    """Let ``role`` draw the dropout masks that the student draws next, so that the two passes differ in time alone.

    Song et al. 2023 and Geng et al. 2024 do so in their code. If the student has no dropout, ``role`` has none.
    """
    with bank.using(STUDENT) as student:
        training = student.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), in_mode(bank, role, training=training):
        yield


def is_single_precision(bank: NetworkBank, role: str, device: torch.device) -> bool:
    """Return whether ``role`` computes in float32 or better now: no autocast, and no frozen weights of bfloat16."""
    half = _half_tensors(bank, role) or _half_layers(bank, role)
    return not torch.is_autocast_enabled(device.type) and not half


def in_one_pass(bank: NetworkBank, role: str, device: torch.device) -> bool:
    """Return whether ``role``'s own pass can carry tangents: in float32, of plain blocks, all weights at hand."""
    with bank.using(role) as network:
        is_plain = not is_compiled(network) and not is_checkpointed(network)
    return is_plain and not bank.blueprints and is_single_precision(bank, role, device)


@contextlib.contextmanager
def single_precision(bank: NetworkBank, role: str, device: torch.device) -> Iterator[None]:
    """Let ``role`` compute in float32, also where adapters lie on a base of bfloat16, and convert it back afterwards.

    No bit is lost on the way, but the network's whole base is held in float32 meanwhile. There must be no graph whose
    backward pass needs its weights.

    Raises:
        ValueError: if that base is divided among processes, where weights cannot change their type.
    """
    half = _half_tensors(bank, role)
    if any(map(is_share, half)):
        raise ValueError("teacher.dtype: expected float32 for a difference of two calls of divided networks, got less")
    types = [tensor.dtype for tensor in half]
    layers = [(layer, layer.compute_dtype) for layer in _half_layers(bank, role)]
    for tensor in half:
        tensor.data = tensor.data.float()
    for layer, _ in layers:
        layer.compute_dtype = torch.float32
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for tensor, dtype in zip(half, types, strict=True):
            tensor.data = tensor.data.to(dtype)
        for layer, dtype in layers:
            layer.compute_dtype = dtype


HALF = (torch.bfloat16, torch.float16)


def _half_tensors(bank: NetworkBank, role: str) -> list[Tensor]:
    with bank.using(role) as network:
        return [tensor for tensor in itertools.chain(network.parameters(), network.buffers()) if tensor.dtype in HALF]


def _half_layers(bank: NetworkBank, role: str) -> list[Any]:
    """Return the layers that cast their input to less than float32, as bitsandbytes' of 4 bits do."""
    with bank.using(role) as network:
        return [layer for layer in network.modules() if getattr(layer, "compute_dtype", None) in HALF]
