"""Frozen layers in fewer bits, under adapters that train in full precision (QLoRA, Dettmers et al. 2023, 2305.14314).

``int8`` is torchao's: a byte per weight and a scale per output, on any device. ``nf4`` is bitsandbytes': half a byte,
with CUDA. Only linear layers with adapters change; the layer of before stays in the host's memory, for the export.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_quantization(form: str, bank: str) -> None:
    """Raise ``ValueError`` if a network cannot be held in this form: its package, CUDA, or adapters are missing."""
    if bank != "adapter":
        raise ValueError(
            f"teacher.quantization: expected bank.name=adapter, which keeps the network frozen, got {bank}"
        )
    package = PACKAGES[form]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"teacher.quantization: {form}: expected the package {package}; run: pip install {package}")
    if form == "nf4" and not torch.cuda.is_available():
        raise ValueError("teacher.quantization: nf4: expected a CUDA device, got none; int8 works on any")


def quantize_layers(layers: list[Any], form: str) -> dict[int, nn.Module]:
    """Replace the linear layers under adapters by quantised ones; return those of before by the new ones' ``id``.

    Args:
        layers: PEFT's layers.
        form: ``int8`` or ``nf4``.
    """
    make: Callable[[nn.Linear], nn.Module] = {"int8": int8, "nf4": nf4}[form]
    originals: dict[int, nn.Module] = {}
    for layer in layers:
        original = layer.get_base_layer()
        if isinstance(original, nn.Linear):
            layer.base_layer = make(original)
            originals[id(layer.base_layer)] = original
    return originals


def int8(original: nn.Linear) -> nn.Module:
    """Return a frozen layer whose weight has a byte per entry."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = copy.deepcopy(original)
    quantize_(nn.Sequential(layer), Int8WeightOnlyConfig())
    return layer.requires_grad_(False)


def nf4(original: nn.Linear) -> nn.Module:
    """Return a frozen layer of four bits per weight; it is quantised when it comes to the GPU."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        original.in_features, original.out_features, original.bias is not None,
        compute_dtype=original.weight.dtype, quant_type="nf4",
    )  # fmt: skip
    layer.load_state_dict(original.state_dict())
    return layer.requires_grad_(False)
