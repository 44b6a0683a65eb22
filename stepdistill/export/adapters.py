"""A student's adapter as files, for stock ``load_lora_weights`` and for ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from stepdistill.export.contract import Contract
from stepdistill.export.kohya import DOWN, kohya_weights

COMFYUI = "comfyui.safetensors"
"""The file in kohya's layout, beside diffusers' own ``pytorch_lora_weights.safetensors``."""


def write_adapter(
    pipeline: Any, component: str, adapter: Mapping[str, Tensor], contract: Contract, folder: Path
) -> None:
    """Write an adapter into a folder, in diffusers' layout and, where its names are known, in kohya's.

    Args:
        pipeline: the student's, whose class says how diffusers saves adapters.
        component: of the network.
        adapter: by PEFT's names.
        contract: the student's, for the header.
        folder: where to; it is made.
    """
    pipeline.save_lora_weights(folder, **{f"{component}_lora_layers": dict(adapter)})
    weights = kohya_weights(type(getattr(pipeline, component)).__name__, adapter)
    if weights is not None:
        rank = next(len(tensor) for name, tensor in adapter.items() if name.endswith(DOWN))
        save_file(weights, folder / COMFYUI, metadata=header(contract, rank))


def header(contract: Contract, rank: int) -> dict[str, str]:
    """Return what programs read of an adapter without its weights: rank, alpha, how to call it, what triggers it."""
    scale = "" if contract.guidance_scale is None else f", guidance scale {contract.guidance_scale:g}"
    facts = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "modelspec.title": f"{contract.origin.method or 'student'}, {contract.steps} steps",
        "modelspec.usage_hint": f"{contract.steps} steps{scale}, {contract.scheduler} at {contract.timesteps}",
    }
    triggers = ", ".join(contract.origin.triggers)
    return facts | ({"modelspec.trigger_phrase": triggers} if triggers else {})
