"""The outputs of a network's blocks, captured by hooks while it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stepdistill.networks.compilation import OutputHook
from stepdistill.networks.sharding import is_share, members


class _AllCaptured(Exception):  # noqa: N818  # no error: it ends a forward pass whose rest is not needed
    """The last output has been captured."""


def capture_outputs(network: nn.Module, names: Sequence[str], call: Callable[[], object]) -> list[Tensor]:
    """Run ``network`` up to the last of the sub-modules ``names``, and return their outputs.

    Args:
        network: the network that ``call`` runs.
        names: sub-modules, each of which runs once; a list of blocks stands for its members.
        call: runs the network.

    Returns:
        A tensor (B, C, N) or (B, C, H, W) per module.
    """
    modules = block_modules(network, names)
    sharded = any(is_share(parameter) for parameter in network.parameters())
    captured: dict[int, Tensor] = {}

    def keep(index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        # a UNet's block returns (image, (skips, ...)), a two-stream block (text, image)
        parts = (output,) if torch.is_tensor(output) else output
        captured[index] = as_map([part for part in parts if torch.is_tensor(part)][-1])
        if len(captured) == len(modules) and not sharded:
            raise _AllCaptured

    handles: list[RemovableHandle | OutputHook] = []
    for index, module in enumerate(modules):
        handles.append(OutputHook(module, functools.partial(keep, index)))
    if sharded:
        handles += also_return(network, captured)
    try:
        call()
    except _AllCaptured:
        pass
    finally:
        for handle in reversed(handles):
            handle.remove()
    assert len(captured) == len(modules), f"of {len(modules)} modules only {len(captured)} ran"
    return [captured[index] for index in range(len(modules))]


def also_return(network: nn.Module, captured: dict[int, Tensor]) -> list[RemovableHandle]:
    """Make ``captured`` an output of a sharded network, which always runs to its end.

    It gathers its weights again when a gradient reaches one of its outputs; without this, the gradient of a feature
    would find no weights.
    """
    return [
        network.register_forward_hook(lambda module, inputs, output: (output, dict(captured)), prepend=True),
        network.register_forward_hook(lambda module, inputs, outputs: outputs[0]),
    ]


def block_modules(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Return the sub-modules of these names; a ``ModuleList`` stands for its members."""
    modules: list[nn.Module] = []
    for name in names:
        module = network.get_submodule(name)
        modules.extend(members(module) or [module])
    return modules


def middle_block(network: nn.Module, names: Sequence[str]) -> str:
    """Return the name of the block halfway through a network: a UNet's bottleneck, or a transformer's middle block.

    Args:
        network: the network.
        names: its blocks, or lists of them, in the order in which they run; a UNet's end with its bottleneck.
    """
    if not names:
        raise ValueError("method: its critic reads the fake score's bottleneck, but no blocks of the network are known")
    if not members(network.get_submodule(names[-1])):
        return names[-1]
    blocks = block_names(network, names)
    return blocks[len(blocks) // 2]


def spaced_blocks(network: nn.Module, names: Sequence[str], limit: int) -> list[str]:
    """Return the names of at most ``limit`` blocks, evenly spaced, the last among them; names as above."""
    if not names:
        raise ValueError("method: it compares features of the teacher, but no blocks of its network are known")
    blocks = block_names(network, names)
    count = min(limit, len(blocks))
    return [blocks[(index + 1) * len(blocks) // count - 1] for index in range(count)]


def block_names(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names of all blocks; a list of blocks stands for its members."""
    blocks = []
    for name in names:
        count = len(members(network.get_submodule(name)))
        blocks += [f"{name}.{index}" for index in range(count)] or [name]
    return blocks


def as_map(output: Tensor) -> Tensor:
    """Return an output (B, C), (B, N, C) or (B, C, H, W) with channels second and at least one position."""
    return {2: output[..., None], 3: output.transpose(1, -1), 4: output}[output.ndim]
