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

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from diffusers import DiffusionPipeline

from stepdistill.files.reading import read_json

INDEX = "model_index.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
LIBRARIES = ("diffusers", "transformers")
"""Libraries that an index may name; beside them, packages of ``diffusers.pipelines`` and files of this package."""
CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "custom_generate")
"""Settings by which transformers and diffusers find Python code, in the folder or in any repository."""
KERNEL_KEYS = ("attn_implementation", "experts_implementation", "kernel_config")
"""Parts of the names of settings by which transformers finds kernels to download, if a value names a repository."""


def permission_hint(key: str) -> str:
    """Return how a user allows what is refused."""
    return f"allow it with teacher.{key}=true, --{key} (generate, evaluate) or {key}=True (load_pipeline)"


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
    foreign = trust_remote_code and not is_our_code(folder)
    if not foreign:
        refuse_foreign_classes(folder)
    if not trust_pickles:
        for part in parts(folder):
            refuse_pickles(folder / part)
    options["use_safetensors"] = wants_safetensors(trust_pickles)
    if foreign:
        return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    return _open_checked(folder, options)


def wants_safetensors(trust_pickles: bool) -> bool | None:
    """Return ``use_safetensors`` of ``from_pretrained``: True requires safetensors, None prefers them."""
    return None if trust_pickles else True


def parts(folder: Path) -> list[str]:
    """Return the parts of a pipeline that have a folder in its folder."""
    return list(part_entries(read_index(folder)))


def part_entries(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the entries of an index that name the class of a part, by the part's name."""
    found = {}
    for name, entry in index.items():
        if type(entry) is list and name.isidentifier() and name[0] != "_" and type(entry[0] if entry else 0) is str:
            found[name] = entry
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of ``model_index.json``; empty if there is none, as for a network without a pipeline."""
    path = folder / INDEX
    return read_json(path) if path.is_file() else {}


def values_by_key(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield key and value of every object in a JSON value, at any depth."""
    waiting = [tree]
    while waiting:
        match waiting.pop():
            case dict() as section:
                yield from section.items()
                waiting += section.values()
            case list() as items:
                waiting += items


# ------------------------------------------------------------------------------------------- opening


def _open_checked(folder: Path, options: Mapping[str, Any]) -> DiffusionPipeline:
    """Open a folder with classes of diffusers, transformers and this package alone; none of its files is run."""
    index = read_index(folder)  # once: what is checked is what diffusers gets
    cls, own = pipeline_class(folder, index), {}
    for name, entry in part_entries(index).items():
        part = part_class(folder, name, entry)
        if part is not None and name not in options:
            own[name] = part.from_pretrained(folder / name, **_part_options(name, part, options))
            index[name] = ["diffusers", _kind(part)]
    index["_class_name"] = cls.__name__
    base = cls if is_our_class(cls) else DiffusionPipeline
    pipeline = _reading(base, index).from_pretrained(folder, trust_remote_code=False, **own, **options)
    if is_our_class(cls):
        pipeline.__class__ = cls
    return pipeline


def _reading(base: type, index: Mapping[str, Any]) -> Any:
    """Return the class ``base``, for which every folder has the given index."""
    load_config = classmethod(lambda cls, *_, **__: dict(index))
    return type(base.__name__, (base,), {"load_config": load_config, "__module__": base.__module__})


def _part_options(name: str, cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a pipeline that concern a part of one of this package's classes."""
    if _kind(cls) == "SchedulerMixin":
        return {}
    found = {"use_safetensors": options["use_safetensors"]}
    dtype = options.get("dtype", options.get("torch_dtype"))
    if type(dtype) is dict:
        dtype = dtype.get(name, dtype.get("default"))
    return found if dtype is None else found | {"dtype": dtype}


def _kind(cls: type) -> str:
    """Return the base class of diffusers by which it recognises a part that is given to it."""
    from diffusers import SchedulerMixin

    return "SchedulerMixin" if issubclass(cls, SchedulerMixin) else "ModelMixin"


# ------------------------------------------------------------------------------------------- classes


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


def _refuse(folder: Path, name: str, entry: Any, expected: str) -> NoReturn:
    raise ValueError(
        f"{folder / INDEX}: {name}: expected {expected}, got {entry!r}; if you trust its author, "
        f"{permission_hint('trust_remote_code')}"
    )


def pipeline_class(folder: Path, index: Mapping[str, Any]) -> type:
    """Return the pipeline's class, of diffusers or of this package."""
    import diffusers

    entry = index.get("_class_name")
    if type(entry) is list:
        return _our_class(folder, folder, "_class_name", entry)
    cls = getattr(diffusers, entry, None) if type(entry) is str and entry.isidentifier() else None
    if not inspect.isclass(cls) or not issubclass(cls, DiffusionPipeline) or cls._load_connected_pipes:
        # a connected pipeline downloads others, which the page README.md of the folder names
        _refuse(folder, "_class_name", entry, "a pipeline of diffusers")
    return cls


def part_class(folder: Path, name: str, entry: list[Any]) -> type | None:
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


def is_our_class(cls: type) -> bool:
    """Return whether a class is one of ``stepdistill.pipelines``."""
    return cls.__module__.startswith("stepdistill.pipelines")


# ------------------------------------------------------------------------------------------ settings


def refuse_settings(place: Path, permission: str, *, deep: bool = False) -> None:
    """Raise ``ValueError`` if the settings of a model name code, kernels, or weights elsewhere.

    Args:
        place: the folder with ``config.json``, ``tokenizer_config.json`` and the like.
        permission: what the user can do.
        deep: whether folders in it count, as of a processor's parts.
    """
    for path in sorted((place.rglob if deep else place.glob)("*config.json")):
        if path.name == "adapter_config.json":
            raise ValueError(f"{path}: expected a whole model, got an adapter, which names another; {permission}")
        for key, value in values_by_key(read_json(path, Any)):
            kernel = any(word in key for word in KERNEL_KEYS) and "/" in str(value)
            if (key in CODE_KEYS or kernel) and value:
                raise ValueError(f"{path}: {key}: names code that would run ({value}); {permission}")
            if key == "transformers_weights" and value and not _is_plain(value, ".safetensors"):
                raise ValueError(f"{path}: {key}: expected a .safetensors file in the folder, got {value!r}")


def _is_plain(name: Any, *suffixes: str) -> bool:
    """Return whether ``name`` is that of a file in the folder itself, with one of the suffixes."""
    path = Path(str(name))
    return path.name == str(name) and path.suffix in suffixes


# ------------------------------------------------------------------------------------------- pickles


def only_pickle(part: Path) -> Path | None:
    """Return a pickle in the folder of a part whose weights exist only as pickles; None for all other parts."""
    pickles = sorted(file for file in part.glob("*") if file.suffix in PICKLES)
    return pickles[0] if pickles and not any(part.glob("*.safetensors")) else None


def refuse_pickles(part: Path, permission: str = "") -> None:
    """Raise ``ValueError`` if the weights of a part exist only as pickles, or its index of shards names others."""
    if (pickle := only_pickle(part)) is not None:
        raise ValueError(
            f"{pickle} is a pickle, which can run code when it is read; expected .safetensors. If you trust its "
            f"author, {permission or permission_hint('trust_pickles')}"
        )
    for path in sorted(part.glob("*.safetensors.index*.json")):
        for shard in read_json(path, dict[str, dict[str, Any]]).get("weight_map", {}).values():
            if not _is_plain(shard, ".safetensors"):
                raise ValueError(f"{path}: weight_map: expected .safetensors files in the folder, got {shard!r}")


# ---------------------------------------------------------------------------------------------- code


def own_class(folder: Path) -> tuple[str, str] | None:
    """Return module and name of the folder's custom pipeline class; None if its class is diffusers' or missing."""
    name = read_index(folder).get("_class_name")
    return (str(name[0]), str(name[-1])) if type(name) is list and name else None


def code_files(folder: Path) -> list[Path]:
    """Return every Python file in the directory and in the folders that its parts link to."""
    return sorted({*folder.rglob("*.py"), *folder.glob("*/*.py")})


def refuse_code(folder: Path) -> None:
    """Raise ``ValueError`` if a Python file in the directory is not this package's."""
    if not is_our_code(folder):
        files = ", ".join(str(file.relative_to(folder)) for file in code_files(folder)) or "whose file is missing"
        raise ValueError(
            f"{folder}: brings its own code ({files}); read it, then {permission_hint('trust_remote_code')}"
        )


@functools.cache
def our_files() -> Mapping[bytes, str]:
    """Return the modules of ``stepdistill.pipelines`` by the content of their files."""
    import stepdistill.pipelines

    files = Path(stepdistill.pipelines.__file__).parent.glob("*.py")
    return {file.read_bytes(): f"stepdistill.pipelines.{file.stem}" for file in files}


def is_our_code(folder: Path) -> bool:
    """Return whether every Python file in the directory is identical to one of ``stepdistill.pipelines``."""
    files = code_files(folder)
    return bool(files) and all(file.is_file() and file.read_bytes() in our_files() for file in files)


def stock_base(folder: Path, module: str, name: str) -> str | None:
    """Return the diffusers class that the folder's custom pipeline class derives from. This runs the folder's code."""
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    cls = get_class_from_dynamic_module(str(folder), f"{module}.py", class_name=name, trust_remote_code=True)
    return next((base.__name__ for base in cls.__mro__ if base.__module__.startswith("diffusers.")), None)


def read_code(folder: Path) -> dict[str, bytes]:
    """Return the Python files of a directory by their path in it; none if they are all this package's."""
    files = [] if is_our_code(folder) else code_files(folder)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
