"""Tensors that live in the host's memory and visit the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def hold_on_host(tensors: Iterable[Tensor]) -> None:
    """Move tensors to the host, where there is a GPU into pinned memory, from which copies are fastest."""
    for tensor in tensors:
        home = tensor.data.to("cpu")
        tensor.data = home.pin_memory() if torch.cuda.is_available() else home


@contextlib.contextmanager
def visiting(tensors: Iterable[Tensor], device: torch.device | str) -> Iterator[None]:
    """Have tensors that nothing changes on ``device`` inside the context.

    They are copied there and dropped afterwards; their own memory waits, so that nothing is copied back. What is there
    already is left alone.
    """
    homes = [(tensor, tensor.data) for tensor in tensors if tensor.device != torch.device(device)]
    try:
        for tensor, home in homes:
            tensor.data = home.to(device, non_blocking=True)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


def tensors_of(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters and buffers of modules."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
