"""Safe loading of model folders: Python files and pickles can run code.

Neither is opened unless the user allows it. Pickles are then read by torch's restricted unpickler (``weights_only``),
as in diffusers and transformers, which creates only tensors and plain containers. Python files run without
restriction.

A Python file that is identical to one of this package needs no permission, because it is not run: its class is taken
from the package. So nothing in a folder can run, whatever happens to its files between the check and the loading. All
other classes that a folder names are looked up in diffusers and transformers and must be models, schedulers, tokenizers
or processors. docs/SECURITY.md lists what is refused and what the permissions open.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from stepdistill.files.weights import READING, read_network
from stepdistill.loading.classes import is_our_class, part_class, pipeline_class, refuse_foreign_classes
from stepdistill.loading.code import is_our_code, read_code, refuse_code, stock_base
from stepdistill.loading.index import own_class, part_entries, parts, read_index
from stepdistill.loading.networks import absent_parts, dtype_of, read_networks
from stepdistill.loading.pickles import only_pickle, permission_hint, refuse_pickles, wants_safetensors

__all__ = [
    "is_our_code",
    "only_pickle",
    "open_folder",
    "own_class",
    "parts",
    "permission_hint",
    "read_code",
    "read_index",
    "refuse_code",
    "refuse_pickles",
    "stock_base",
    "wants_safetensors",
]


def open_folder(folder: Path, *, trust_remote_code: bool, trust_pickles: bool, **options: Any) -> DiffusionPipeline:
    """Open the pipeline in a folder without running untrusted files.

    Args:
        folder: a folder with a ``model_index.json``.
        trust_remote_code: whether Python files that are not this package's may run.
        trust_pickles: whether weights that exist only as pickles may be read.
        options: of ``DiffusionPipeline.from_pretrained``.

    Raises:
        ValueError: with the names of the files that would run, or of the entry that is not allowed.
    """
    if "custom_pipeline" in options and not trust_remote_code:
        raise ValueError(f"custom_pipeline: is code that would run; {permission_hint('trust_remote_code')}")
    foreign = trust_remote_code and not is_our_code(folder)
    if not foreign:
        refuse_foreign_classes(folder)
    if not trust_pickles:
        for part in parts(folder):
            refuse_pickles(folder / part)
    options = absent_parts(folder) | read_networks(folder, options, pickles=trust_pickles) | options
    options["use_safetensors"] = wants_safetensors(trust_pickles)
    with READING:
        if foreign or "custom_pipeline" in options:
            return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
        return _open_checked(folder, options)


def _open_checked(folder: Path, options: Mapping[str, Any]) -> DiffusionPipeline:
    """Open a folder with classes of diffusers, transformers and this package alone; none of its files is run."""
    index = read_index(folder)  # once: what is checked is what diffusers gets
    cls: Any = pipeline_class(folder, index)
    own = {}
    for name, entry in part_entries(index).items():
        part = part_class(folder, name, entry)
        if part is not None and name not in options:
            own[name] = _open_part(name, part, folder / name, options)
            index[name] = ["diffusers", _kind(part)]
    index["_class_name"] = cls.__name__
    base = cls if is_our_class(cls) else DiffusionPipeline
    reader = _reading(base, index, cls._optional_components)
    pipeline = reader.from_pretrained(folder, trust_remote_code=False, **own, **options)
    if is_our_class(cls):
        pipeline.__class__ = cls
    return pipeline


def _reading(base: type, index: Mapping[str, Any], optional: list[str]) -> Any:
    """Return the class ``base``, for which every folder has the given index.

    With the ``optional`` parts of the folder's own class: diffusers reads again from the folder what it does not know
    for a part.
    """
    load_config = classmethod(lambda cls, *_, **__: dict(index))
    return type(
        base.__name__,
        (base,),
        {"load_config": load_config, "_optional_components": optional, "__module__": base.__module__},
    )


def _open_part(name: str, cls: Any, place: Path, options: Mapping[str, Any]) -> Any:
    """Open a part of one of this package's classes, under the options of a pipeline."""
    if _kind(cls) == "SchedulerMixin":
        return cls.from_pretrained(place)
    pickles = options["use_safetensors"] is None
    return read_network(place, cls, pickles=pickles, dtype=dtype_of(name, options))


def _kind(cls: type) -> str:
    """Return the base class of diffusers by which it recognises a part that is given to it."""
    from diffusers import SchedulerMixin

    return "SchedulerMixin" if issubclass(cls, SchedulerMixin) else "ModelMixin"
