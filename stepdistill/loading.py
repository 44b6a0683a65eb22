"""Safe loading of model folders: Python files and pickles can run code.

Neither is opened unless the user allows it. Pickles are then read by torch's restricted unpickler (``weights_only``),
as in diffusers and transformers, which creates only tensors and plain containers. Python files run without
restriction. A file that is identical to one of this package needs no permission.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

PICKLES = (".bin", ".ckpt", ".pt", ".pth")


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
        ValueError: with the names of the files that would run.
    """
    own = runs_own_code(folder)
    if own and not trust_remote_code:
        refuse_code(folder)
    if not trust_pickles:
        for part in parts(folder):
            refuse_pickles(folder / part)
    return DiffusionPipeline.from_pretrained(
        folder, use_safetensors=wants_safetensors(trust_pickles), trust_remote_code=own, **options
    )


def wants_safetensors(trust_pickles: bool) -> bool | None:
    """Return ``use_safetensors`` of ``from_pretrained``: True requires safetensors, None prefers them."""
    return None if trust_pickles else True


def parts(folder: Path) -> list[str]:
    """Return the parts of a pipeline that have a folder in its folder."""
    entries = read_index(folder).items()
    return [name for name, entry in entries if isinstance(entry, list) and entry[0] and name[0] != "_"]


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of ``model_index.json``; empty if there is none, as for a network without a pipeline."""
    path = folder / "model_index.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# --------------------------------------------------------------------------------------------------- pickles


def only_pickle(part: Path) -> Path | None:
    """Return a pickle in the folder of a part whose weights exist only as pickles; None for all other parts."""
    pickles = sorted(file for file in part.glob("*") if file.suffix in PICKLES)
    return pickles[0] if pickles and not any(part.glob("*.safetensors")) else None


def refuse_pickles(part: Path) -> None:
    """Raise ``ValueError`` if the weights of a part exist only as pickles."""
    if (pickle := only_pickle(part)) is not None:
        raise ValueError(
            f"{pickle} is a pickle, which can run code when it is read; expected .safetensors. If you trust its "
            f"author, {permission_hint('trust_pickles')}"
        )


# ------------------------------------------------------------------------------------------------------ code


def runs_own_code(folder: Path) -> bool:
    """Return whether loading the directory would run Python files in it."""
    return own_class(folder) is not None or bool(code_files(folder))


def own_class(folder: Path) -> tuple[str, str] | None:
    """Return module and name of the folder's custom pipeline class; None if its class is diffusers' or missing."""
    name = read_index(folder).get("_class_name")
    return (name[0], name[1]) if isinstance(name, list) else None


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


def is_our_code(folder: Path) -> bool:
    """Return whether every Python file in the directory is identical to one of ``stepdistill.pipelines``."""
    import stepdistill.pipelines

    ours = {file.read_bytes() for file in Path(stepdistill.pipelines.__file__).parent.glob("*.py")}
    files = code_files(folder)
    return bool(files) and all(file.read_bytes() in ours for file in files)


def stock_base(folder: Path, module: str, name: str) -> str | None:
    """Return the diffusers class that the folder's custom pipeline class derives from. This runs the folder's code."""
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    cls = get_class_from_dynamic_module(str(folder), f"{module}.py", class_name=name, trust_remote_code=True)
    return next((base.__name__ for base in cls.__mro__ if base.__module__.startswith("diffusers.")), None)


def read_code(folder: Path) -> dict[str, bytes]:
    """Return the Python files of a directory by their path in it; none if they are all this package's."""
    files = [] if is_our_code(folder) else code_files(folder)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
