"""Labels and captions as data files hold them: read row by row, and an error only for a teacher that needs them.

A caption is a text, or a list of texts, of which one is drawn on every visit. ``""`` is the empty caption. A caption is
missing if there is no value, a null, or a list without texts; it never becomes a word such as "None".
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")

Texts: TypeAlias = tuple[str, ...]
"""The captions of one sample, in the order of the file; empty if they are missing."""


class Column(Generic[T]):
    """Values of one column, gathered row by row, and the first problem that makes them useless.

    A problem is no error yet, because the teacher may not want the column at all.
    """

    def __init__(self) -> None:
        self._values: list[T] = []
        self.problem: str | None = None

    def add(self, read: Callable[..., T], *arguments: Any) -> None:
        """Append ``read(*arguments)``; if that is a ``ValueError``, it is the column's problem."""
        if self.problem is not None:
            return
        try:
            self._values.append(read(*arguments))
        except ValueError as error:
            self.fail(str(error))

    def fail(self, problem: str) -> None:
        """Note why the column cannot be used."""
        self.problem = self.problem or problem

    @property
    def values(self) -> list[T] | None:
        """The values; None if there is a problem."""
        return self._values if self.problem is None else None


def read_texts(value: Any, where: str) -> Texts:
    """Return the captions in a value: a text, a list of texts and nulls, or null.

    Args:
        value: as JSON or a table gives it.
        where: the file and row, for errors.

    Raises:
        ValueError: for anything else, and for text with half of a surrogate pair.
    """
    try:
        texts = tuple(text for text in _items(value) if text is not None)
        for text in texts:
            str.encode(text)
    except UnicodeEncodeError as error:
        letter = f"U+{ord(error.object[error.start]):04X}"
        raise ValueError(f"{where}: expected text, got {letter}, half of a surrogate pair, in {value!r:.60}") from None
    except TypeError:
        raise ValueError(f"{where}: expected text, or a list of texts, got {value!r:.60}") from None
    return texts


@functools.singledispatch
def _items(value: Any) -> Sequence[Any]:
    raise TypeError(f"{type(value).__name__} holds no captions")


@_items.register
def _(value: str) -> Sequence[Any]:
    return (value,)


@_items.register
def _(value: list) -> Sequence[Any]:
    return value


@_items.register
def _(value: None) -> Sequence[Any]:
    return ()


def read_label(value: Any, where: str) -> int:
    """Return a whole number of 64 bits, which may be written as text.

    Raises:
        ValueError: naming ``where`` for anything else.
    """
    if type(value) is int and abs(value) < 2**63:  # not isinstance, because true is no label
        return value
    text = str(value).strip()
    if not text.isdecimal() or len(text) > 18:
        raise ValueError(f"{where}: expected a whole number, got {value!r:.60}")
    return int(text)


def first_texts(captions: Sequence[Texts] | None) -> list[str] | None:
    """Return the first caption of every sample; None if there are none, or one is missing."""
    if captions is None or () in captions:
        return None
    return [texts[0] for texts in captions]


def several(captions: Sequence[Texts]) -> Sequence[Texts] | None:
    """Return the captions of every sample if one has more than one; None, and no memory taken, if none has."""
    return captions if any(len(texts) > 1 for texts in captions) else None


def other_texts(choices: Sequence[Texts] | None) -> list[str]:
    """Return the captions beyond the first of every sample."""
    return list(itertools.chain.from_iterable(texts[1:] for texts in choices or ()))
