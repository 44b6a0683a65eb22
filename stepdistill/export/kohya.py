"""A student's adapter in the layout of kohya's scripts, which ComfyUI, WebUIs and diffusers itself read.

A layer ``a.b.0`` of the model's original code has the keys ``lora_unet_a_b_0.lora_down.weight`` (rank, in),
``lora_unet_a_b_0.lora_up.weight`` (out, rank) and ``lora_unet_a_b_0.alpha``. Where the original has one layer for
several of diffusers' (queries, keys and values), its adapter is the block-diagonal one of theirs: the same weights, at
the sum of their ranks. UNets keep diffusers' names, as in kohya's own files for Stable Diffusion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""Endings of PEFT's names."""

BFL = (
    (r"transformer_blocks\.(\d+)\.attn\.to_(?P<part>[qkv])", r"double_blocks.\1.img_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.add_(?P<part>[qkv])_proj", r"double_blocks.\1.txt_attn.qkv"),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
)
FLUX = (
    *BFL,
    (r"transformer_blocks\.(\d+)\.ff\.net\.(\d)(?:\.proj)?", r"double_blocks.\1.img_mlp.\2"),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.(\d)(?:\.proj)?", r"double_blocks.\1.txt_mlp.\2"),
    (r"single_transformer_blocks\.(\d+)\.(?:attn\.to|proj)_(?P<part>[qkv]|mlp)", r"single_blocks.\1.linear1"),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2"),
    (r"proj_out", r"final_layer.linear"),
)
NAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "UNet2DConditionModel": ((r"(.+)", r"\1"),),
    "QwenImageTransformer2DModel": ((r"(.+)", r"\1"),),
    "FluxTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": (
        *BFL,
        (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
    ),
    "SD3Transformer2DModel": (
        (r"transformer_blocks\.(\d+)\.(attn2?)\.to_(?P<part>[qkv])", r"joint_blocks.\1.x_block.\2.qkv"),
        (r"transformer_blocks\.(\d+)\.attn\.add_(?P<part>[qkv])_proj", r"joint_blocks.\1.context_block.attn.qkv"),
        (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
        (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    ),
    "WanTransformer3DModel": (
        (r"blocks\.(\d+)\.attn1\.to_([qkvo])(?:ut\.0)?", r"blocks.\1.self_attn.\2"),
        (r"blocks\.(\d+)\.attn2\.to_([qkvo])(?:ut\.0)?", r"blocks.\1.cross_attn.\2"),
        (r"blocks\.(\d+)\.ffn\.net\.(\d)(?:\.proj)?", r"blocks.\1.ffn.\2"),
    ),
    "Lumina2Transformer2DModel": (
        (r"(.+)\.attn\.to_(?P<part>[qkv])", r"\1.attention.qkv"),
        (r"(.+)\.attn\.to_out\.0", r"\1.attention.out"),
    ),
    "ZImageTransformer2DModel": (
        (r"(.+\.attention)\.to_(?P<part>[qkv])", r"\1.qkv"),
        (r"(.+\.attention)\.to_out\.0", r"\1.out"),
        (r"(.+\.feed_forward\.w\d)", r"\1"),
    ),
}
"""By class of network, patterns of its layers' names and the names in the original code."""


def kohya_weights(network: str, adapter: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return an adapter in kohya's layout; None if it has layers whose original names are not known here.

    Args:
        network: class of the network.
        adapter: by PEFT's names, ``<layer>.lora_A.weight`` (rank, in) and ``<layer>.lora_B.weight`` (out, rank), whose
            product is the difference to the network's weights.
    """
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    names = original_layers(network, adapter)
    if names is None:
        return None
    fused: dict[str, Tensor] = {}
    for original, layers in names.items():
        fused[f"unet.{original}{DOWN}"] = torch.cat([adapter[layer + DOWN] for layer in layers])
        fused[f"unet.{original}{UP}"] = block_diagonal([adapter[layer + UP] for layer in layers])
    return convert_state_dict_to_kohya(fused)


def original_layers(network: str, adapter: Mapping[str, Tensor]) -> dict[str, list[str]] | None:
    """Return for every layer of the original code that is adapted, diffusers' layers of its rows, in order.

    None if a layer is unknown, or only a part of an original one is adapted.
    """
    found: dict[str, dict[str, str]] = {}
    wanted: dict[str, str] = {}
    for key in adapter:
        if key.endswith(DOWN):
            layer = key.removesuffix(DOWN)
            original, part, parts = original_name(network, layer)
            found.setdefault(original, {})[part] = layer
            wanted[original] = parts
    if "" in found or any(set(layers) != {*wanted[original].split()} for original, layers in found.items()):
        return None
    return {original: [layers[part] for part in wanted[original].split()] for original, layers in found.items()}


def original_name(network: str, layer: str) -> tuple[str, str, str]:
    """Return the name of a layer in the original code (empty: unknown), which part of it this is, and all its parts.

    >>> original_name("FluxTransformer2DModel", "single_transformer_blocks.3.proj_mlp")
    ('single_blocks.3.linear1', 'mlp', 'q k v mlp')
    """
    for pattern, name in NAMES.get(network, ()):
        if match := re.fullmatch(pattern, layer):
            parts = "whole" if "part" not in match.groupdict() else "q k v mlp" if "mlp" in pattern else "q k v"
            return match.expand(name), match.groupdict().get("part", "whole"), parts
    return "", "", ""


def block_diagonal(parts: list[Tensor]) -> Tensor:
    """Return matrices (out, rank) below and beside each other, zeros elsewhere; a single one as it is."""
    return torch.block_diag(*parts) if len(parts) > 1 else parts[0]
