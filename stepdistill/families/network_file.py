"""Single files that hold a teacher's network alone, as today's transformers are passed around (FLUX.1, SD3.5, Wan).

Its other parts (VAE, text encoders, scheduler) and its settings are those of a complete pipeline, ``teacher.config``.
diffusers converts the names of the original layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.families.config import TeacherConfig
from stepdistill.families.hub import expand_home, fetch, is_path, nearest_place
from stepdistill.families.single_file import SAFETENSORS
from stepdistill.files.reading import read_json
from stepdistill.files.weights import LIBRARY_ERRORS, READING, first_names, naming

NETWORKS = ("unet", "transformer")
"""Folders whose weights are not fetched from the hub, because the file has them."""
PREFIX = "model.diffusion_model."
OTHER_PARTS = ("first_stage_model.", "vae.", "text_encoders.", "cond_stage_model.", "conditioner.")
"""Beginnings of names of weights of a VAE or of text encoders."""


def companion(file: Path, config: TeacherConfig) -> Path:
    """Return the folder of the complete pipeline that ``teacher.config`` names, fetched if it is on the hub.

    Raises:
        ValueError: if there is none, or the key is not set; the sentence says what the file holds.
    """
    if config.config is None:
        weights = read_checkpoint(file)
        raise ValueError(
            f"teacher.path: {file}: expected a whole checkpoint of Stable Diffusion 1.x, 2.x or SDXL (network, VAE and "
            f"text encoders), got {found_in(weights)}; for a network alone, set teacher.config to the folder or hub id "
            "of a complete pipeline of its kind, or convert another whole checkpoint with from_single_file and "
            "save_pretrained of its own diffusers pipeline"
        )
    folder = expand_home(config.config)
    if not folder.exists() and not is_path(config.config):
        named = dataclasses.replace(config, path=config.config, revision=None)
        folder = fetch(named, without=NETWORKS, key="teacher.config")
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"teacher.config: {folder}: expected the folder of a complete pipeline, with its model_index.json, got "
            f"none{nearest_place(folder)}"
        )
    return folder


def read_network_file(file: Path, folder: Path, component: str, dtype: str) -> Any:
    """Return the network in a single file as ``from_pretrained`` returns that of a folder.

    Args:
        file: weights by diffusers' names or the original ones.
        folder: of a pipeline with the network's ``<component>/config.json``.
        component: ``"unet"`` or ``"transformer"``.
        dtype: precision of the weights.

    Raises:
        ValueError: if the file holds another network, or more or less than this one.
    """
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    name = network_class(folder, component)
    if name is None or name not in SINGLE_FILE_LOADABLE_CLASSES:
        raise ValueError(f"teacher.path: {file}: expected a folder, because diffusers reads no single file of {name}")
    cls = getattr(diffusers, name)
    settings = cls.load_config(folder, subfolder=component, local_files_only=True)
    weights = fitted_weights(file, cls, settings, SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"])
    with READING, naming(file):
        network = cls.from_single_file(
            dict(weights), config=str(folder), subfolder=component, local_files_only=True, dtype=getattr(torch, dtype)
        )
    for key, parameter in network.named_parameters():  # as from_pretrained leaves them
        if {*key.split(".")} & {*(cls._keep_in_fp32_modules or ())}:
            parameter.data = weights[key].float()
    return network


def fitted_weights(file: Path, cls: Any, settings: Mapping[str, Any], convert: Any) -> dict[str, Tensor]:
    """Return the weights of a file by diffusers' names: each that a network of ``cls`` has, and no other."""
    from accelerate import init_empty_weights

    weights = read_checkpoint(file)
    what = found_in(weights)
    expected = f"teacher.path: {file}: expected the weights of a {cls.__name__} with the settings of teacher.config"
    with READING, init_empty_weights():
        wanted = cls.from_config(settings).state_dict()
    plain = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    try:
        found = plain if wanted.keys() <= plain.keys() else dict(convert(checkpoint=weights, config=settings))
    except LIBRARY_ERRORS as error:
        raise ValueError(f"{expected}, got {what}") from error
    for problem, names in (("without", wanted.keys() - found.keys()), ("with also", found.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{expected}, got {what}, {problem} {first_names(names)}")
    for key, tensor in found.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(f"{expected}, {tuple(wanted[key].shape)} in {key}, got {tuple(tensor.shape)}")
    return found


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Return the weights in a file by its own names; the caller has checked that it may be read.

    Raises:
        ValueError: if it has those of other parts too, or eight bits a number.
    """
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    with READING, naming(file):
        weights = load_file(file) if file.suffix in SAFETENSORS else load_single_file_checkpoint(str(file))
    if others := [name for name in weights if name.startswith(OTHER_PARTS)]:
        raise ValueError(
            f"teacher.path: {file}: expected a whole checkpoint of Stable Diffusion 1.x, 2.x or SDXL, or a network "
            f"alone, got a network with weights of other parts ({first_names(others)}); convert it with "
            "from_single_file and save_pretrained of its own diffusers pipeline, and give that folder"
        )
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.element_size() < 2:
            raise ValueError(f"teacher.path: {file}: {name}: expected full or half precision, got {tensor.dtype}")
    return weights


def found_in(weights: Mapping[str, Tensor]) -> str:
    """Return in words what diffusers takes the weights of a file for.

    >>> found_in({"lora_unet_mid_block_conv1.lora_down.weight": torch.zeros(1)})
    'an adapter (LoRA), which is for teacher.lora'
    """
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type

    if any("lora_" in name for name in weights):
        return "an adapter (LoRA), which is for teacher.lora"
    kind = infer_diffusers_model_type(weights)
    if kind == "v1" and f"{PREFIX}input_blocks.0.0.weight" not in weights:  # what diffusers says where it knows nothing
        return f"{len(weights)} weights such as {first_names(list(weights)[:1])}"
    place = DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(kind, {}).get("pretrained_model_name_or_path")
    return f"a network of the kind {kind!r}{f' ({place})' if place else ''}"


def network_class(folder: Path, component: str) -> str | None:
    """Return the class name in ``<component>/config.json``, or None if there is no such component."""
    path = folder / component / "config.json"
    if not path.is_file():
        return None
    name = read_json(path).get("_class_name")
    if type(name) is not str:
        raise ValueError(f"teacher.path: {path}: _class_name: expected the class of the network, got {name!r}")
    return name
