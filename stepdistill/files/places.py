"""Paths from outside, as a type: ``output_dir: Place``. A shell leaves the ``~`` of ``key=~/folder`` as it is."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Any, TypeAlias


@dataclasses.dataclass(frozen=True)
class Paths:
    """Paths and names that are not empty, with the user's home for a leading ``~``."""

    def plain(self, value: Any) -> Any:
        """Return the path that is meant."""
        return os.path.expanduser(value) if type(value) is str else value

    def __contains__(self, place: str) -> bool:
        return bool(place)

    def __str__(self) -> str:
        return "a path"


Place: TypeAlias = Annotated[str, Paths()]
