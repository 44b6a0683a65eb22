"""Ranges of numbers from outside, as types: ``steps: PositiveInt``, ``q: Annotated[float, Range(above=1)]``.

:func:`~stepdistill.files.schema.build` refuses a number outside the range of its field, and :func:`in_range` makes the
same range the type of a command-line flag. NaN and infinity are in no range.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, TypeAlias, get_args


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """The finite numbers that meet every limit which is given.

    >>> str(Range(at_least=0, below=1)), 1 in Range(at_least=0, below=1)
    ('at least 0 and below 1', False)
    """

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def plain(self, value: Any) -> Any:
        """Return the value as it is: a number has no other words."""
        return value

    def __contains__(self, number: float) -> bool:
        return self.at_least <= number <= self.at_most and self.above < number < self.below

    def __str__(self) -> str:
        limits = []
        for name, limit in dataclasses.asdict(self).items():
            if math.isfinite(limit):
                limits.append(f"{name.replace('_', ' ')} {limit}")
        return " and ".join(limits) or "any finite number"


PositiveInt: TypeAlias = Annotated[int, Range(at_least=1)]
NonNegativeInt: TypeAlias = Annotated[int, Range(at_least=0)]
PositiveFloat: TypeAlias = Annotated[float, Range(above=0)]
NonNegativeFloat: TypeAlias = Annotated[float, Range(at_least=0)]
FiniteFloat: TypeAlias = Annotated[float, Range()]
Share: TypeAlias = Annotated[float, Range(at_least=0, at_most=1)]
PositiveShare: TypeAlias = Annotated[float, Range(above=0, at_most=1)]
Decay: TypeAlias = Annotated[float, Range(at_least=0, below=1)]
"""How much of a moving average stays at a step."""
Seed: TypeAlias = Annotated[int, Range(at_least=0, at_most=2**63 - 1)]
GuidanceScale: TypeAlias = Annotated[float, Range(at_least=1)]
"""Of a method; 1 is no guidance."""


def in_range(hint: Any) -> Callable[[str], Any]:
    """Return the ``type`` of a command-line flag that takes numbers of the type ``hint``, one of the above.

    >>> in_range(PositiveInt)("4")
    4
    """
    kind, numbers = get_args(hint)

    def read(text: str) -> Any:
        number = kind(text)  # argparse turns its ValueError into "invalid int value"
        if number not in numbers:
            raise argparse.ArgumentTypeError(f"expected {numbers}, got {text}")
        return number

    read.__name__ = kind.__name__
    return read
