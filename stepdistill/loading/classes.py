"""Classes that a pipeline's index may name: diffusers', transformers', and this package's."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from diffusers import DiffusionPipeline

from stepdistill.loading.code import code_files, our_files, refuse_code
from stepdistill.loading.index import INDEX, own_class, part_entries, read_index
from stepdistill.loading.pickles import permission_hint
from stepdistill.loading.settings import refuse_settings

LIBRARIES = ("diffusers", "transformers")
"""Libraries that an index may name; beside them, packages of ``diffusers.pipelines`` and files of this package."""


def refuse_foreign_classes(folder: Path) -> None:
    """Raise ``ValueError`` if a folder names a class or a file that is not diffusers', transformers' or ours."""
    index = read_index(folder)
    if code_files(folder) or own_class(folder) is not None:
        refuse_code(folder)
    pipeline_class(folder, index)
    for name, entry in index.items():
        if type(entry) is list and type(entry[0] if entry else 0) is str and not name.isidentifier():
            _refuse(folder, name, entry, "a plain name")
    refuse_settings(folder, permission_hint("trust_remote_code"))
    for name, entry in part_entries(index).items():
        part_class(folder, name, entry)
        refuse_settings(folder / name, permission_hint("trust_remote_code"), deep=True)


def pipeline_class(folder: Path, index: Mapping[str, Any]) -> type:
    """Return the pipeline's class, of diffusers or of this package."""
    import diffusers

    entry = index.get("_class_name")
    if type(entry) is list:
        return _our_class(folder, folder, "_class_name", entry)
    cls: Any = getattr(diffusers, entry, None) if type(entry) is str and entry.isidentifier() else None
    if not inspect.isclass(cls) or not issubclass(cls, DiffusionPipeline):
        _refuse(folder, "_class_name", entry, "a pipeline of diffusers")
    if getattr(cls, "_load_connected_pipes", False):
        _refuse(folder, "_class_name", entry, "a pipeline that loads no others, which README.md of the folder names")
    return cls


def part_class(folder: Path, name: str, entry: list[Any]) -> Any:
    """Return the class of a part if it is one of this package's; None if it is one of diffusers' or transformers'.

    Raises:
        ValueError: if it is neither.
    """
    if len(entry) != 2 or type(entry[1]) is not str or not entry[1].isidentifier():
        _refuse(folder, name, entry, "a library and a class")
    library, class_name = entry
    if not library.isidentifier():
        _refuse(folder, name, entry, "the plain name of a library or of a file beside it")
    if (folder / name / f"{library}.py").exists():
        return _our_class(folder, folder / name, name, entry)
    if library not in LIBRARIES and not _is_pipeline_package(library):
        _refuse(folder, name, entry, "a class of diffusers or transformers")
    cls = getattr(_stock_module(library), class_name.removeprefix("FlashPack"), None)
    if cls is None or hasattr(cls, "_backends"):  # diffusers says what is missing
        return None
    if not inspect.isclass(cls) or not issubclass(cls, _part_bases()):
        _refuse(folder, name, entry, "a model, scheduler, tokenizer or processor")
    return None


def is_our_class(cls: type) -> bool:
    """Return whether a class is one of ``stepdistill.pipelines``."""
    return cls.__module__.startswith("stepdistill.pipelines")


def _refuse(folder: Path, name: str, entry: Any, expected: str) -> NoReturn:
    raise ValueError(
        f"{folder / INDEX}: {name}: expected {expected}, got {entry!r}; if you trust its author, "
        f"{permission_hint('trust_remote_code')}"
    )


def _is_pipeline_package(library: str) -> bool:
    return library[0] != "_" and importlib.util.find_spec(f"diffusers.pipelines.{library}") is not None


def _stock_module(library: str) -> Any:
    return importlib.import_module(library if library in LIBRARIES else f"diffusers.pipelines.{library}")


@functools.cache
def _part_bases() -> tuple[type, ...]:
    """Return the classes whose loading reads nothing but settings and weights."""
    import diffusers
    import transformers

    names = ("PreTrainedModel", "PreTrainedTokenizerBase", "FeatureExtractionMixin", "ImageProcessingMixin")
    mine = [diffusers.ModelMixin, diffusers.SchedulerMixin, transformers.ProcessorMixin]
    return (*mine, *(getattr(transformers, name) for name in names))


def _our_class(folder: Path, place: Path, name: str, entry: list[Any]) -> type:
    """Return the class of this package that an entry [file, class] names, by the content of the file."""
    if len(entry) != 2 or not all(type(word) is str and word.isidentifier() for word in entry):
        _refuse(folder, name, entry, "the plain names of a file in the folder and of its class")
    file = place / f"{entry[0]}.py"
    module = our_files().get(file.read_bytes()) if file.is_file() else None
    cls = getattr(importlib.import_module(module), entry[1], None) if module else None
    if cls is None or cls.__module__ != module:
        _refuse(folder, name, entry, "a class in a file of stepdistill.pipelines")
    return cls
