"""Frozen layers in few bits under adapters that train in full precision (as QLoRA, Dettmers et al. 2023, 2305.14314).

torchao's ``int8`` holds a byte per weight and a scale per output. bitsandbytes' ``nf4`` holds four bits per weight and
a scale of eight bits per 64 of them. Only linear layers with adapters change; the originals stay in the host's memory,
for the export.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES: Mapping[str, str] = MappingProxyType({"int8": "torchao", "nf4": "bitsandbytes"})
"""The package that has each form."""


def check_quantization(form: str, bank: str) -> None:
    """Raise ``ValueError`` if no network can be held in a form: its package or adapters are missing."""
    if bank != "adapter":
        raise ValueError(
            f"teacher.quantization: expected bank.name=adapter, which keeps the network frozen, got {bank}"
        )
    package = PACKAGES[form]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"teacher.quantization: expected the package {package}, got none; run: pip install {package}")


def quantize_layers(layers: list[Any], form: str) -> dict[int, nn.Module]:
    """Replace the linear ones of PEFT's layers by ``form``; return the originals by the ``id`` of the new ones."""
    originals: dict[int, nn.Module] = {}
    for layer in layers:
        original = layer.get_base_layer()
        if isinstance(original, nn.Linear):
            layer.base_layer = FORMS[form](original)
            originals[id(layer.base_layer)] = original
    return originals


def int8(original: nn.Linear) -> nn.Module:
    """Return a frozen layer whose weight has a byte per entry."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = copy.deepcopy(original)
    quantize_(nn.Sequential(layer), Int8WeightOnlyConfig())
    return layer.requires_grad_(False)


def nf4(original: nn.Linear) -> nn.Module:
    """Return a frozen layer whose weight has half a byte per entry, and which computes in its precision."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, bias = original.weight.detach(), original.bias
    layer = Linear4bit(
        original.in_features, original.out_features, bias=bias is not None, compute_dtype=weight.dtype,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.weight = Params4bit(packed_like(weight) if weight.is_meta else weight, quant_type="nf4", requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    layer.support_avx512bf16_for_cpu = False  # or a CPU packs weights as no backward can read them
    layer.to(weight.device)  # there bitsandbytes rounds the weight
    return layer.requires_grad_(False)


def packed_like(weight: Tensor) -> Tensor:
    """Return a tensor of the size that a weight has in four bits, for a plan."""
    return torch.empty(weight.numel() // 2, 1, dtype=torch.uint8, device=weight.device)


FORMS: Mapping[str, Callable[[nn.Linear], nn.Module]] = MappingProxyType({"int8": int8, "nf4": nf4})
"""By ``teacher.quantization``."""
