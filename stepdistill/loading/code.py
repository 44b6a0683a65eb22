"""Python files in a model's folder: this package's, or foreign ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from stepdistill.loading.pickles import permission_hint


def code_files(folder: Path) -> list[Path]:
    """Return every Python file in the directory and in the folders that its parts link to."""
    return sorted({*folder.rglob("*.py"), *folder.glob("*/*.py")})


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


def refuse_code(folder: Path) -> None:
    """Raise ``ValueError`` if a Python file in the directory is not this package's."""
    if not is_our_code(folder):
        files = ", ".join(str(file.relative_to(folder)) for file in code_files(folder)) or "whose file is missing"
        raise ValueError(
            f"{folder}: brings its own code ({files}); read it, then {permission_hint('trust_remote_code')}"
        )


def read_code(folder: Path) -> dict[str, bytes]:
    """Return the Python files of a directory by their path in it; none if they are all this package's."""
    files = [] if is_our_code(folder) else code_files(folder)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def stock_base(folder: Path, module: str, name: str) -> str | None:
    """Return the diffusers class that the folder's custom pipeline class derives from. This runs the folder's code."""
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    cls = get_class_from_dynamic_module(str(folder), f"{module}.py", class_name=name, trust_remote_code=True)
    return next((base.__name__ for base in cls.__mro__ if base.__module__.startswith("diffusers.")), None)
