"""The outputs of a network's blocks, captured by hooks while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stepdistill.networks.sharding import is_share


class _AllCaptured(Exception):  # noqa: N818  # no error: it ends a forward pass whose rest is not wanted
    """The last feature has been seen."""


def capture_outputs(network: nn.Module, names: Sequence[str], call: Callable[[], object]) -> list[Tensor]:
    """What the sub-modules ``names`` of ``network`` return while ``call`` runs it, as far as the last of them.

    Args:
        network: the network that ``call`` runs.
        names: sub-modules, a list of blocks standing for each of its blocks; each runs once.
        call: runs the network.

    Returns:
        A tensor (B, C, N) or (B, C, H, W) a module.
    """
    modules = block_modules(network, names)
    found: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            # a UNet's block returns (image, (skips, ...)), a two-stream block (text, image)
            parts = output if isinstance(output, tuple) else (output,)
            found[index] = as_map([part for part in parts if isinstance(part, Tensor)][-1])
            if len(found) == len(modules) and not sharded:
                raise _AllCaptured

        return hook

    handles = [module.register_forward_hook(keep(index)) for index, module in enumerate(modules)]
    if sharded := any(is_share(parameter) for parameter in network.parameters()):
        handles += returned_beside(network, found)
    try:
        call()
    except _AllCaptured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    assert len(found) == len(modules), f"of {len(modules)} modules only {len(found)} ran"
    return [found[index] for index in range(len(modules))]


def returned_beside(network: nn.Module, found: dict[int, Tensor]) -> list[RemovableHandle]:
    """Let a sharded network, which runs to its end, take ``found`` for outputs of its own as well.

    It gathers its weights again when a gradient reaches one of its outputs; a feature's would find no weights there.
    """
    return [
        network.register_forward_hook(lambda module, inputs, output: (output, dict(found)), prepend=True),
        network.register_forward_hook(lambda module, inputs, outputs: outputs[0]),
    ]


def block_modules(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The sub-modules of these names; a ``ModuleList`` stands for its members."""
    modules = [network.get_submodule(name) for name in names]
    return [m for module in modules for m in (module if isinstance(module, nn.ModuleList) else [module])]


def as_map(output: Tensor) -> Tensor:
    """A block's output (B, C), (B, N, C) or (B, C, H, W) with its channels second and at least one position."""
    return {2: output[..., None], 3: output.transpose(1, -1), 4: output}[output.ndim]
