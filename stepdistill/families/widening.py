"""Heads that give several predictions in one call, beside each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def widen_convolution(network: Any, name: str, points: int) -> None:
    """Multiply the output channels of a network's last convolution by ``points``, in place, each prediction the same.

    The channels are (points, C): all of the first prediction, then all of the second. ``out_channels`` of the network's
    config becomes their number, so that stock diffusers loads the weights.
    """
    narrow = network.get_submodule(name)
    channels = points * narrow.out_channels
    wide = nn.Conv2d(
        narrow.in_channels, channels, narrow.kernel_size, narrow.stride, narrow.padding,
        device=narrow.weight.device, dtype=narrow.weight.dtype,
    )  # fmt: skip
    wide.load_state_dict({name: torch.cat([value] * points) for name, value in narrow.state_dict().items()})
    setattr(network, name, wide.requires_grad_(narrow.weight.requires_grad))
    network.register_to_config(out_channels=channels)
