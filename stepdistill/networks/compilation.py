"""Compiling the repeated blocks of networks, which all share one compiled graph, instead of whole networks.

What is compiled is what diffusers' ``compile_repeated_blocks`` compiles, or the blocks named here for the networks that
name none. Nothing else in the package knows: a compiled block has the same parameters under the same names, copies
of it are not compiled, and forward derivatives run it uncompiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo

UNNAMED = ["BasicTransformerBlock", "JointTransformerBlock", "SanaTransformerBlock", "ResnetBlock2D"]
"""Repeated blocks of the networks whose class does not name them."""
GRAPHS = 128
"""Graphs of one block: roles, with and without gradient, one or two batch sizes; torch's limit is 8."""

Hook = Callable[[nn.Module, Any, Any], None]
"""Called with a module, its inputs and its output."""


def compile_blocks(network: Any, key: str, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the repeated blocks of a diffusers network, in place; each kind at its first call.

    Args:
        network: the network, with or without adapters.
        key: what asked for it, for the message.
        backend: of ``torch.compile``.

    Raises:
        ValueError: if it has no blocks that are known to repeat.
    """
    if not getattr(network, "_repeated_blocks", None):
        network._repeated_blocks = UNNAMED
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    try:
        network.compile_repeated_blocks(backend=backend)
    except (ValueError, AttributeError) as error:
        name = type(network).__name__
        raise ValueError(f"{key}: expected false, because {name} has no blocks that are known to repeat") from error


def is_compiled(network: nn.Module) -> bool:
    """Return whether blocks of a network are compiled."""
    return any(module._compiled_call_impl is not None for module in network.modules())


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled blocks run as they are written, for derivatives in forward mode.

    A compiled block would drop them without a word (pytorch#192985).
    """
    return torch.compiler.set_stance("force_eager")


class OutputHook:
    """A hook on a module's output that also sees a compiled one's: torch compiles the hooks of its first call alone."""

    def __init__(self, module: nn.Module, hook: Hook) -> None:
        self.module, self.compiled = module, module._compiled_call_impl
        self.hook = hook
        if self.compiled is None:
            self.handle = module.register_forward_hook(hook)
        else:
            module._compiled_call_impl = self._call

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        assert self.compiled is not None
        output = self.compiled(*args, **kwargs)
        self.hook(self.module, args, output)
        return output

    def remove(self) -> None:
        """Take the hook away; of several on one module, the newest first."""
        if self.compiled is None:
            self.handle.remove()
        else:
            self.module._compiled_call_impl = self.compiled
