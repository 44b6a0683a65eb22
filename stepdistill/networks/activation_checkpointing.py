"""Activations that are recomputed at backward instead of kept, in the context that was there at forward."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

from torch import nn
from torch.utils.checkpoint import checkpoint

Contexts = Callable[[], tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]]
"""Asked at every forward of a block: the contexts of that forward and of its recomputation."""


def enable_checkpointing(network: nn.Module, contexts: Contexts) -> None:
    """Recompute the activations of a diffusers network at backward.

    Raises:
        ValueError: if the network's class has no gradient checkpointing.
    """
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(network).__name__} does not support gradient checkpointing")
    network.enable_gradient_checkpointing(functools.partial(_checkpoint, contexts))  # type: ignore[operator]


def without_checkpointing(network: nn.Module) -> nn.Module:
    """Return the same network, keeping its activations again and holding no ``contexts``."""
    for module in network.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # type: ignore[assignment]
            module._gradient_checkpointing_func = None  # type: ignore[assignment]
    return network


def _checkpoint(contexts: Contexts, function: nn.Module, *args: object) -> object:
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
