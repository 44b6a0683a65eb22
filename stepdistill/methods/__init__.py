"""Distillation methods, one file each. A file's name is the method's name in a configuration; there is no registry."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from stepdistill.files.schema import ConfigError
from stepdistill.files.words import nearest
from stepdistill.methods.base import Distiller


def method_names() -> tuple[str, ...]:
    """Return the names of all methods."""
    return tuple(info.name for info in pkgutil.iter_modules(__path__) if info.name != "base")


def find_method(name: str) -> type[Distiller]:
    """Return the distiller of ``methods/<name>.py``.

    Raises:
        ConfigError: if there is no such method, with the nearest name.
    """
    if name not in method_names():
        raise ConfigError([f"method.name: {name!r} is not a method{nearest(str(name), method_names())}"])
    module = importlib.import_module(f"{__name__}.{name}")
    for _, found in inspect.getmembers(module, inspect.isclass):
        if issubclass(found, Distiller) and found.__module__ == module.__name__:
            return found
    raise AssertionError(f"{module.__name__} defines no distiller")
