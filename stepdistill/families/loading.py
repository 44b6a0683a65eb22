"""Finding the family of a teacher, and opening teachers."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import stepdistill.families as package
from stepdistill.families.additions import add_to_teacher
from stepdistill.families.base import Family
from stepdistill.families.config import TeacherConfig
from stepdistill.families.guiding import guided_as_asked
from stepdistill.families.hub import expand_home, locate
from stepdistill.families.network_file import companion, network_class, read_network_file
from stepdistill.files.reading import read_json
from stepdistill.files.weights import naming, variants
from stepdistill.files.words import nearest
from stepdistill.loading import (
    open_folder,
    own_class,
    part_entries,
    permission_hint,
    read_index,
    refuse_code,
    stock_base,
)
from stepdistill.loading.settings import refuse_endless

HARMLESS = ("safety_checker", "feature_extractor")
"""Parts of pipelines that change no image."""


def families() -> dict[str, type[Family]]:
    """Return every family, by the name of its file."""
    found: dict[str, type[Family]] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and issubclass(cls, Family) and not inspect.isabstract(cls):
                found[module_info.name] = cls
    return found


def load_teacher(config: TeacherConfig) -> Family:
    """Open a teacher: a diffusers pipeline folder, a bare ``unet/`` or ``transformer/`` folder, a checkpoint, a hub id.

    Raises:
        ValueError: if there is no such folder, its network's class belongs to no family, it has parts or weights that
            would be dropped or are missing, or it would run untrusted code.
    """
    known = families()
    if config.family is not None and config.family not in known:
        raise ValueError(f"teacher.family: unknown family {config.family!r}{nearest(config.family, known)}")
    place = locate(config)
    if place.is_file():
        return load_checkpoint(place, config, known)
    if config.config is not None:
        raise ValueError(f"teacher.config: expected none, because {place} is no single file, got {config.config!r}")
    return load_from_folder(place, config, known)


def load_from_folder(place: Path, config: TeacherConfig, known: dict[str, type[Family]]) -> Family:
    """Open the teacher in a folder, but with the network of ``teacher.path`` if that is a file."""
    cls = find_family(place, config, known) if config.family is None else known[config.family]
    check_parts(place, cls)
    check_settings(place)
    check_variant(place, config.variant)
    with fitting(place, cls):
        return guided_as_asked(cls.load(place, config), config)


def load_checkpoint(file: Path, config: TeacherConfig, known: dict[str, type[Family]]) -> Family:
    """Open a checkpoint.

    It is whole (:mod:`stepdistill.families.single_file`) or of a network (:mod:`stepdistill.families.network_file`).
    """
    from stepdistill.families.single_file import open_checkpoint, pipeline_name

    pipeline = pipeline_name(file, config)
    if pipeline is None:
        return load_from_folder(companion(file, config), config, known)
    if config.variant is not None:
        raise ValueError(f"teacher.variant: expected none for a single file, got {config.variant!r}")
    pipe = open_checkpoint(file, pipeline, config)
    add_to_teacher(pipe, config)
    cls: Any = next(cls for cls in known.values() if type(pipe).__name__ in cls.pipeline_names)
    if config.family not in (None, cls.__module__.rpartition(".")[2]):
        raise ValueError(f"teacher.family: got {config.family!r}, but {file} is a {type(pipe).__name__}")
    with fitting(file, cls):
        return guided_as_asked(cls.from_pipe(pipe, config), config)


def find_family(folder: Path, config: TeacherConfig, known: dict[str, type[Family]]) -> type[Family]:
    """Return the family of the network and the pipeline in a folder."""
    pipeline = pipeline_class(folder, config.trust_remote_code)
    for cls in known.values():
        if network_class(folder, cls.component) in cls.network_classes and cls.accepts_pipeline(pipeline):
            return cls
    if own_class(folder) is not None and not config.trust_remote_code:
        refuse_code(folder)
    if can_be_observed(pipeline):
        return known["observed"]
    found = network_class(folder, "unet") or network_class(folder, "transformer")
    supported = (f"{name} ({', '.join(cls.network_classes)})" for name, cls in sorted(known.items()))
    raise ValueError(
        f"teacher.path: {config.path}: no family has the network {found!r} in the pipeline {pipeline!r}; "
        f"known: {', '.join(supported)}. "
        "A new family is one file in stepdistill/families/, see CONTRIBUTING.md."
    )


def can_be_observed(pipeline: str | None) -> bool:
    """Return whether the call of a diffusers pipeline needs nothing but a prompt, so that it can be watched."""
    import diffusers

    cls: Any = getattr(diffusers, pipeline, None) if pipeline else None
    if not inspect.isclass(cls) or not issubclass(cls, diffusers.DiffusionPipeline):
        return False
    taken = inspect.signature(cls.__call__).parameters
    needed = {name for name, parameter in taken.items() if parameter.default is parameter.empty} - {"self", "kwargs"}
    return "prompt" in taken and needed <= {"prompt"} and not {"image", "image_embeds"} & taken.keys()


def pipeline_class(folder: Path, trust_remote_code: bool) -> str | None:
    """Return the diffusers class of the pipeline in a folder, or the one that its custom class derives from.

    None if there is no ``model_index.json``, or if the custom code must not run.
    """
    own = own_class(folder)
    if own is None:
        return read_index(folder).get("_class_name")
    return stock_base(folder, *own) if trust_remote_code else None


# -------------------------------------------------------------------------------------------- what is refused


def check_parts(folder: Path, cls: type[Family]) -> None:
    """Raise ``ValueError`` if the pipeline in a folder has a part that the family would drop, or lacks one it needs."""
    index = read_index(folder)
    if not index:
        return
    found = part_entries(index)
    family, pipeline = cls.__module__.rpartition(".")[2], index.get("_class_name")
    taken, optional = cls.parts_of(pipeline if type(pipeline) is str else None)
    for name in sorted({*found} & {*cls.refused_parts}):
        raise ValueError(f"teacher.path: {folder}: {pipeline} has the part {name!r}, {cls.refused_parts[name]}")
    for name in sorted({*found} - taken - optional - {*HARMLESS}):
        raise ValueError(
            f"teacher.path: {folder}: {pipeline} has the part {name!r} ({found[name][-1]}), which the family "
            f"{family!r} would drop; expected only {', '.join(sorted(taken))}"
        )
    for name in sorted(taken - {*found}):
        raise ValueError(f"teacher.path: {folder}: {pipeline} has no {name}, which the family {family!r} needs")


def check_settings(folder: Path) -> None:
    """Raise ``ValueError`` if a part has no end, or quantised weights, into which no student can be merged."""
    for path in sorted(folder.glob("*/*config.json")):
        settings = read_json(path, Any)
        refuse_endless(path, settings)
        quantised = settings.get("quantization_config") if type(settings) is dict else None
        if quantised:
            method = quantised.get("quant_method", quantised) if type(quantised) is dict else quantised
            raise ValueError(
                f"teacher.path: {path}: quantization_config: the weights are quantised ({method}); expected the "
                "teacher in full or half precision"
            )


def check_variant(folder: Path, variant: str | None) -> None:
    """Raise ``ValueError``, which names those there are, if no part has the wanted variant of its weights."""
    found = set[str]()
    for part in folder.iterdir():
        found |= variants(path.name for path in part.glob("*"))
    if variant is not None and variant not in found:
        others = ", ".join(sorted(found - {""})) or "none"
        raise ValueError(f"teacher.variant: expected a variant that {folder} has ({others}), got {variant!r}")


@contextlib.contextmanager
def fitting(place: Path, cls: type[Family]) -> Iterator[None]:
    """Turn what is raised for settings that do not fit into a ``ValueError`` of the key ``teacher.path``."""
    try:
        with naming(place, f"its settings do not make a working {cls.__name__}"):
            yield
    except ValueError as error:
        if str(error).startswith("teacher."):
            raise
        raise ValueError(f"teacher.path: {error}") from error


# ------------------------------------------------------------------------------------------------- opening


def open_pipeline(folder: Path, component: str, config: TeacherConfig) -> Any:
    """Open a teacher's pipeline, its network in the configured precision and all other parts in float32.

    Raises:
        ValueError: if it is incomplete, or would run untrusted code.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"teacher.path: {folder}: no model_index.json; expected a complete pipeline (VAE, text encoder, ...)"
        )
    options: dict[str, Any] = {
        "dtype": {"default": torch.float32, component: getattr(torch, config.dtype)}, "variant": config.variant,
    }  # fmt: skip
    file = expand_home(config.path)
    if file.is_file():
        options[component] = read_network_file(file, folder, component, config.dtype)
    with opening(folder, config):
        pipe = open_folder(
            folder, trust_remote_code=config.trust_remote_code, trust_pickles=config.trust_pickles, **options
        )
    add_to_teacher(pipe, config)
    return pipe


@contextlib.contextmanager
def opening(folder: Path, config: TeacherConfig) -> Iterator[None]:
    """Turn what is raised because a part of a teacher cannot be read into a ``ValueError`` that says what to do."""
    try:
        with naming(folder):
            yield
    except ValueError as error:
        fetched = not (config.trust_pickles or Path(config.path).exists())
        hint = f"; pickles (.bin) are not downloaded: if it has no other weights, {permission_hint('trust_pickles')}"
        raise ValueError(f"teacher.path: {error}{hint if fetched else ''}") from error
