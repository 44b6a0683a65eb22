"""stepdistill: turn a many-step diffusers teacher into a few-step student.

    >>> import stepdistill
    >>> stepdistill.__version__
    '0.1.0'

:func:`distill` trains and exports a student, :func:`load_pipeline` loads one with its sampling contract applied. Names
are imported when they are first used: importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stepdistill.export.pipeline import load_pipeline
    from stepdistill.training.run import distill

__version__ = "0.1.0"
__all__ = ["distill", "load_pipeline"]

_HOMES = {"distill": "stepdistill.training.run", "load_pipeline": "stepdistill.export.pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stepdistill' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
