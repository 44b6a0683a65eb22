"""Gradient checkpointing: activations are recomputed in the backward pass, under the context of the forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint

Contexts = Callable[[], tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]]
"""Called at every forward pass of a block: the contexts of that pass and of its recomputation."""


def enable_checkpointing(network: nn.Module, contexts: Contexts) -> None:
    """Recompute the activations of a diffusers network in the backward pass.

    Raises:
        ValueError: if the network's class has no gradient checkpointing.
    """
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(network).__name__} does not support gradient checkpointing")
    network.enable_gradient_checkpointing(functools.partial(_checkpoint, contexts))  # type: ignore[operator]


def without_checkpointing(network: nn.Module) -> nn.Module:
    """Return the same network without checkpointing, and without a reference to its contexts."""
    for module in network.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # type: ignore[assignment]
            module._gradient_checkpointing_func = None  # type: ignore[assignment]
    return network


def is_checkpointed(network: nn.Module) -> bool:
    """Return whether a network recomputes activations in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


@contextlib.contextmanager
def in_training(network: nn.Module, mode: bool) -> Iterator[None]:
    """Put a network into training (True) or evaluation mode, and back afterwards."""
    before = network.training
    set_training(network, mode)
    try:
        yield
    finally:
        set_training(network, before)


def set_training(network: nn.Module, mode: bool) -> None:
    """Put a network into training or evaluation mode; where it is in that mode, without asking its many modules."""
    if network.training != mode:
        network.train(mode)


def _checkpoint(contexts: Contexts, function: nn.Module, *args: object) -> object:
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
