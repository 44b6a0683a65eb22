"""Frozen layers of int8 under adapters that train in full precision (as QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

torchao's int8 holds a byte per weight and a scale per output, on any device. Only linear layers with adapters change;
the layer of before stays in the host's memory, for the export.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

from torch import nn


def check_quantization(bank: str) -> None:
    """Raise ``ValueError`` if no network can be held in int8: torchao or adapters are missing."""
    if bank != "adapter":
        raise ValueError(
            f"teacher.quantization: expected bank.name=adapter, which keeps the network frozen, got {bank}"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("teacher.quantization: expected the package torchao, got none; run: pip install torchao")


def quantize_layers(layers: list[Any]) -> dict[int, nn.Module]:
    """Replace the linear ones of PEFT's layers by int8; return those of before by the ``id`` of the new ones."""
    originals: dict[int, nn.Module] = {}
    for layer in layers:
        original = layer.get_base_layer()
        if isinstance(original, nn.Linear):
            layer.base_layer = int8(original)
            originals[id(layer.base_layer)] = original
    return originals


def int8(original: nn.Linear) -> nn.Module:
    """Return a frozen layer whose weight has a byte per entry."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = copy.deepcopy(original)
    quantize_(nn.Sequential(layer), Int8WeightOnlyConfig())
    return layer.requires_grad_(False)
