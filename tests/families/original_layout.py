"""Miniatures of Stable Diffusion and SDXL as one file in the original layout, as users of other tools have them.

The names are the reverse of what diffusers reads, for networks of one layer a block, as the miniatures are.
"""

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
VAE = {
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
}  # fmt: skip
CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn"}


def unet_name(name):
    for new, old in ENDS.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    side, block, kind, index, rest = re.fullmatch(r"(down|mid|up)_block(?:s\.(\d))?\.(\w+)\.(\d)\.(.*)", name).groups()
    index, place = int(index), 2 * int(block or 0)
    if kind == "resnets":
        part, _, end = rest.partition(".")
        rest = f"{RESNET[part]}.{end}"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{place + 2}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":  # after the attention, which the first up block of the miniature has
        return f"output_blocks.{place + 1}.2.{rest}"
    where = f"input_blocks.{place + 1 + index}" if side == "down" else f"output_blocks.{place + index}"
    return f"{where}.{1 if kind == 'attentions' else 0}.{rest}"


def vae_name(name):
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{1 - int(match[1])}", name)
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    for new, old in VAE.items():
        name = name.replace(f"{new}.", f"{old}.")
    return name.replace("resnets.", "block.")


def open_clip(encoder):
    """The second text encoder of SDXL: other names, and one matrix for queries, keys and values."""
    state, found = encoder.state_dict(), {}
    for name, tensor in state.items():
        short = name.removeprefix("text_model.")
        if match := re.fullmatch(r"encoder\.layers\.(\d)\.self_attn\.q_proj\.(weight|bias)", short):
            packed = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(packed)
        elif match := re.fullmatch(r"encoder\.layers\.(\d)\.(?!self_attn\.[kv]_)(.*)", short):
            rest = match[2]
            for new, old in CLIP.items():
                rest = rest.replace(new, old)
            found[f"transformer.resblocks.{match[1]}.{rest}"] = tensor
    found["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    found["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    found["text_projection"] = state["text_projection.weight"].T
    for end in ("weight", "bias"):
        found[f"ln_final.{end}"] = state[f"text_model.final_layer_norm.{end}"]
    return found


def original(pipe):
    """All weights of a pipeline by their original names."""
    encoder = "cond_stage_model" if not hasattr(pipe, "text_encoder_2") else "conditioner.embedders.0"
    found = {f"model.diffusion_model.{unet_name(name)}": value for name, value in pipe.unet.state_dict().items()}
    found |= {f"first_stage_model.{vae_name(name)}": value for name, value in pipe.vae.state_dict().items()}
    for name, value in pipe.text_encoder.state_dict().items():
        found[f"{encoder}.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    if hasattr(pipe, "text_encoder_2"):
        for name, value in open_clip(pipe.text_encoder_2).items():
            found[f"conditioner.embedders.1.model.{name}"] = value
    return {name: tensor.contiguous() for name, tensor in found.items()}


def save_original(pipe, path):
    save_file(original(pipe), path)
    return path
