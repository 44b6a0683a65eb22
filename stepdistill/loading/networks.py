"""The networks of a pipeline's folder, each read whole (:mod:`stepdistill.files.weights`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.files.weights import read_network
from stepdistill.loading.classes import LIBRARIES
from stepdistill.loading.index import part_entries, read_index

PLACING = {"device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config", "use_flashpack"}
"""Options that place or quantise networks while they are read, which only the pipeline's own loading does."""


def read_networks(folder: Path, options: Mapping[str, Any], *, pickles: bool) -> dict[str, Any]:
    """Return the networks of diffusers' and transformers' own classes in a pipeline's folder, by part.

    None under the options :data:`PLACING`; none that the options already contain.

    Raises:
        ValueError: as :func:`stepdistill.files.weights.read_network` does.
    """
    networks: dict[str, Any] = {}
    if PLACING & options.keys():
        return networks
    for name, (library, class_name) in part_entries(read_index(folder)).items():
        cls = getattr(importlib.import_module(library), class_name, None) if library in LIBRARIES else None
        if name not in options and hasattr(cls, "named_parameters"):
            asked = {"variant": options.get("variant"), "dtype": dtype_of(name, options)}
            networks[name] = read_network(folder / name, cls, pickles=pickles, **asked)
    return networks


def absent_parts(folder: Path) -> dict[str, None]:
    """Return None for each part that the index says is not there; diffusers wants to be told so of some."""
    return {name: None for name, entry in read_index(folder).items() if entry == [None, None]}


def dtype_of(name: str, options: Mapping[str, Any]) -> Any:
    """Return the precision of a part that options of ``DiffusionPipeline.from_pretrained`` ask for; None is its own."""
    dtype = options.get("dtype", options.get("torch_dtype"))
    return dtype.get(name, dtype.get("default")) if type(dtype) is dict else dtype
