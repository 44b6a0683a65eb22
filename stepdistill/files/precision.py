"""The precision in which networks compute, also in the words that accelerate has for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias


@dataclasses.dataclass(frozen=True)
class Synonyms:
    """Other words for values, each with the value that is meant."""

    meant: Mapping[Any, Any]

    def plain(self, value: Any) -> Any:
        """Return the value that is meant."""
        return self.meant.get(value, value) if isinstance(value, (str, bool)) else value

    def __contains__(self, value: Any) -> bool:
        return True


FULL = Synonyms({"no": "fp32", False: "fp32"})
"""``no`` is accelerate's word for ``fp32``, and false is what YAML 1.1 makes of it."""

Precision: TypeAlias = Annotated[Literal["fp32", "bf16"], FULL]

TrainingPrecision: TypeAlias = Annotated[Literal["fp32", "bf16", "fp16"], FULL]
"""Half precision too, in which a training scales its losses."""
