"""Names and values from outside, as they are shown to people: short, and without power over a terminal."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

SHOWN = 200
"""Characters of one value in a message."""
LISTED = 20
"""Names, or problems, in one message."""


def visible(text: str) -> str:
    r"""Return ``text`` with every character that is not printed (escape codes, line ends, bidi marks) as its escape.

    >>> print(visible("a\x1b[31m\nb"))
    a\x1b[31m\nb
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def no_letter(text: str) -> str | None:
    r"""Return the first character that is in no text, in words: NUL, or half of a surrogate pair; JSON can spell both.

    >>> no_letter("a\ud83d")
    'U+D83D, half of a surrogate pair'
    """
    found = re.search("[\0\ud800-\udfff]", text)
    if found is None:
        return None
    return "U+0000" if found[0] == "\0" else f"U+{ord(found[0]):04X}, half of a surrogate pair"


def shortened(text: str, longest: int = SHOWN) -> str:
    """Return ``text`` with its middle left out if it is long.

    >>> len(shortened("a" * 1000))
    203
    """
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 2 :]}"


def shown(value: Any) -> str:
    """Return a value in a message: its ``repr``, shortened."""
    return shortened(repr(value[: 2 * SHOWN] if type(value) is str else value))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``names``, or the first of them, or nothing.

    >>> nearest("progresive", ["progressive", "dmd2"])
    "; did you mean 'progressive'?"
    """
    names = sorted(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    known = f"; known: {', '.join(names[:LISTED])}{more}" if names else ""
    return closest(name, names) or known


def closest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``names``, in whatever case it is written, or nothing.

    >>> closest("LCM", ["lcm", "tcd"])
    "; did you mean 'lcm'?"
    """
    lowered = {known.lower(): known for known in names}
    matches = difflib.get_close_matches(name[:SHOWN].lower(), lowered, n=1)
    return f"; did you mean {lowered[matches[0]]!r}?" if matches else ""
