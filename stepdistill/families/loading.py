"""Finding the family of a teacher, and opening teachers."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any

import torch

import stepdistill.families as package
from stepdistill.assets import FASHION
from stepdistill.families.base import Family
from stepdistill.families.config import TeacherConfig
from stepdistill.files.schema import nearest
from stepdistill.loading import DAMAGE, open_folder, own_class, permission_hint, read_index, refuse_code, stock_base


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
    """Open a teacher: a diffusers pipeline directory, a bare ``unet/`` or ``transformer/`` folder, or a hub id.

    Raises:
        ValueError: if there is no such folder, its network's class belongs to no family, or it would run untrusted
            code.
    """
    known = families()
    if config.family is not None and config.family not in known:
        raise ValueError(f"teacher.family: unknown family {config.family!r}{nearest(config.family, known)}")
    folder = locate(config)
    if config.family is not None:
        return known[config.family].load(folder, config)
    pipeline = pipeline_class(folder, config.trust_remote_code)
    for cls in known.values():
        if network_class(folder, cls.component) in cls.network_classes and cls.accepts_pipeline(pipeline):
            return cls.load(folder, config)
    if own_class(folder) is not None and not config.trust_remote_code:
        refuse_code(folder)
    found = network_class(folder, "unet") or network_class(folder, "transformer")
    supported = (f"{name} ({', '.join(cls.network_classes)})" for name, cls in sorted(known.items()))
    raise ValueError(
        f"teacher.path: {config.path}: no family has the network {found!r} in the pipeline {pipeline!r}; "
        f"known: {', '.join(supported)}. "
        "A new family is one file in stepdistill/families/, see CONTRIBUTING.md."
    )


def locate(config: TeacherConfig) -> Path:
    """Return the local folder of ``config.path``: itself, the embedded teacher's, or a downloaded snapshot."""
    if config.path == "embedded":
        return FASHION / "teacher"
    folder = Path(config.path)
    if folder.is_dir():
        return folder
    if config.path.count("/") != 1 or folder.is_absolute() or config.path.startswith("."):
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ValueError(f"teacher.path: no folder {config.path!r}{nearest(folder.name, siblings)}")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    patterns += ["*.bin"] * config.trust_pickles + ["*.py"] * config.trust_remote_code
    return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=patterns))


def network_class(folder: Path, component: str) -> str | None:
    """Return the class name in ``<component>/config.json``, or None if there is no such component."""
    path = folder / component / "config.json"
    return json.loads(path.read_text())["_class_name"] if path.is_file() else None


def pipeline_class(folder: Path, trust_remote_code: bool) -> str | None:
    """Return the diffusers class of the pipeline in a folder, or the one that its custom class derives from.

    None if there is no ``model_index.json``, or if the custom code must not run.
    """
    own = own_class(folder)
    if own is None:
        return read_index(folder).get("_class_name")
    return stock_base(folder, *own) if trust_remote_code else None


def cannot_open(folder: Path, config: TeacherConfig, error: Exception) -> ValueError:
    """Return the error to raise if diffusers raises ``error`` for a teacher's folder."""
    fetched = not (config.trust_pickles or Path(config.path).exists())
    hint = f"; pickles (.bin) are not downloaded: if it has no other weights, {permission_hint('trust_pickles')}"
    return ValueError(f"teacher.path: {folder}: diffusers cannot open it: {error}{hint if fetched else ''}")


def open_pipeline(folder: Path, component: str, config: TeacherConfig) -> Any:
    """Open a teacher's pipeline, its network in the configured precision and all other parts in float32.

    Raises:
        ValueError: if it is incomplete, or would run untrusted code.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"teacher.path: {folder}: no model_index.json; expected a complete pipeline (VAE, text encoder, ...)"
        )
    dtype = {"default": torch.float32, component: getattr(torch, config.dtype)}
    try:
        return open_folder(
            folder, trust_remote_code=config.trust_remote_code, trust_pickles=config.trust_pickles, dtype=dtype
        )
    except DAMAGE as error:
        raise cannot_open(folder, config, error) from error
