"""Single-file checkpoints of Stable Diffusion and SDXL, in the original layout.

diffusers converts them. It needs a pipeline of the same kind for what is not in the file (settings and tokenizers):
``teacher.config``, or the original on the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.families.config import TeacherConfig
from stepdistill.families.hub import SETTINGS, expand_home, is_path, nearest_place, snapshot
from stepdistill.files.weights import LIBRARY_ERRORS, READING, first_names, naming, weight_names
from stepdistill.loading.pickles import PICKLES, pickle_refusal

SAFETENSORS = (".safetensors", ".sft")
WHOLE = ("model.diffusion_model.", "first_stage_model.")
"""Beginnings of names of the network's and the VAE's weights."""
ENCODERS = {
    "StableDiffusionPipeline": ("cond_stage_model.",),
    "StableDiffusionXLPipeline": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
"""Beginnings of names of the text encoders' weights, by pipeline."""


def open_checkpoint(file: Path, pipeline: str, config: TeacherConfig) -> Any:
    """Return the pipeline in a single file, its network in the configured precision and all other parts in float32.

    Raises:
        ValueError: if it lacks weights, or its settings cannot be had.
    """
    import diffusers

    cls = getattr(diffusers, pipeline)
    settings = settings_folder(config)
    try:
        with READING, naming(file):
            pipe = cls.from_single_file(str(file), config=settings)
    except ValueError as error:
        if settings is not None:
            refuse_incomplete_networks(file, settings)
        raise ValueError(f"teacher.path: {error}{'' if settings else hint(file, cls)}") from error
    for name, part in pipe.components.items():
        if hasattr(part, "named_parameters"):
            refuse_missing(file, name, [key for key, tensor in part.state_dict().items() if tensor.is_meta])
            # not diffusers' own, which warns
            nn.Module.to(part, getattr(torch, config.dtype) if name == "unet" else torch.float32)
    return pipe


def pipeline_name(file: Path, config: TeacherConfig) -> str | None:
    """Return the diffusers pipeline of a whole checkpoint, by the names of its weights; None for any other file."""
    if file.suffix in PICKLES and not config.trust_pickles:
        raise ValueError(f"teacher.path: {pickle_refusal(file)}")
    if file.suffix not in (*SAFETENSORS, *PICKLES):
        raise ValueError(f"teacher.path: {file}: expected a folder or a .safetensors checkpoint, got another file")
    try:
        names = checkpoint_names(file)
    except ValueError as error:
        raise ValueError(f"teacher.path: {error}") from error
    for pipeline, encoders in ENCODERS.items():
        if all(any(name.startswith(start) for name in names) for start in (*WHOLE, *encoders)):
            return pipeline
    return None


def checkpoint_names(file: Path) -> set[str]:
    """Return the names of the weights in a checkpoint, without reading them."""
    if file.suffix in SAFETENSORS:
        return weight_names(file)
    with naming(file):
        content = torch.load(file, map_location="meta", weights_only=True)
        return set(content.get("state_dict", content))


def settings_folder(config: TeacherConfig) -> str | None:
    """Return the local folder that ``teacher.config`` names; None leaves it to diffusers, which asks the hub."""
    if config.config is None:
        return None
    folder = expand_home(config.config)
    if not folder.exists() and not is_path(config.config):
        folder = snapshot(config.config, None, [f"*{ending}" for ending in SETTINGS], key="teacher.config")
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"teacher.config: {folder}: expected the folder of a diffusers pipeline of the same kind, with its "
            f"model_index.json, configurations and tokenizers; got none{nearest_place(folder)}"
        )
    return str(folder)


def hint(file: Path, cls: type) -> str:
    """Return what to do where neither the hub nor its cache has the settings."""
    return (
        "; without the hub, set teacher.config to the folder of a pipeline of its kind, or convert the file once where "
        f"the hub can be reached: diffusers.{cls.__name__}.from_single_file({str(file)!r}).save_pretrained('folder')"
    )


def refuse_incomplete_networks(file: Path, settings: str) -> None:
    """Raise ``ValueError`` if the file lacks weights of the network or the VAE.

    diffusers fails on that without their names. Those of the text encoders it leaves on the meta device.
    """
    import diffusers
    from accelerate import init_empty_weights
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    for name, class_name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
        cls = getattr(diffusers, class_name)
        try:
            config = cls.load_config(settings, subfolder=name)
            with init_empty_weights():
                wanted = cls.from_config(config).state_dict()
            convert = SINGLE_FILE_LOADABLE_CLASSES[class_name]["checkpoint_mapping_fn"]
            found = convert(checkpoint=load_single_file_checkpoint(str(file)), config=config)
        except LIBRARY_ERRORS:  # something else is wrong, and the caller says what
            return
        refuse_missing(file, name, sorted(wanted.keys() - found.keys()))


def refuse_missing(file: Path, name: str, missing: list[str]) -> None:
    """Raise ``ValueError`` if there are names of weights that a part of the pipeline lacks."""
    if missing:
        raise ValueError(f"teacher.path: {file}: lacks weights of the {name}: {first_names(missing)}")
