"""What a network's blocks return, watched while it runs: features for critics and for distances.

Features are ``(B, C, N)`` (tokens) or ``(B, C, H, W)`` (maps). The forward itself is nobody's copy: it is the network's
own, watched by hooks and left when all is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stepdistill.denoiser import Denoiser
from stepdistill.sharding import is_share

CLEAN = 0.02
"""The time a network is told that looks at clean images: below it, its features grow empty."""


class _Seen(Exception):  # noqa: N818  # no error: it ends a forward pass whose rest is not wanted
    """The last feature has been seen."""


def seen(network: nn.Module, names: Sequence[str], call: Callable[[], object]) -> list[Tensor]:
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
                raise _Seen

        return hook

    handles = [module.register_forward_hook(keep(index)) for index, module in enumerate(modules)]
    if sharded := any(is_share(parameter) for parameter in network.parameters()):
        handles += returned_beside(network, found)
    try:
        call()
    except _Seen:
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


class BlockFeatures:
    """A denoiser's own features, at noisy images: gradients pass through them to the image.

    Args:
        denoiser: the teacher (LADD), or a fake score (DMD2).
        names: sub-modules; by default those that the family names.
    """

    def __init__(self, denoiser: Denoiser, names: Sequence[str] = ()) -> None:
        self.denoiser = denoiser
        self.names = tuple(names) or denoiser.family.feature_blocks

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> list[Tensor]:
        """Features of images (B, ...) at times (B,), in float32 as heads are, whatever the network is in.

        Only the part of the network below the last of them is run.
        """
        with self.denoiser.bank.using(self.denoiser.role) as network:
            features = seen(network, self.names, lambda: self.denoiser.family.call(network, x_t, t, cond))
        return [feature.float() for feature in features]

    def clean(self, x0: Tensor, cond: Mapping[str, Tensor]) -> list[Tensor]:
        """Features of clean images (B, ...), told to be at a noise too small to see."""
        return self(x0, torch.full((len(x0),), CLEAN, device=x0.device), cond)

    @torch.no_grad()
    def shapes(self) -> list[torch.Size]:
        """The features' shapes, without the batch; runs the network once."""
        family = self.denoiser.family
        x = torch.zeros(1, *family.sample_shape)
        return [feature.shape[1:] for feature in self(x, torch.full((1,), 0.5), family.example_cond([0]))]
