"""Text as users have it: files of prompts and captions, and what is said where they are damaged."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any, TypeVar

from stepdistill.config import nearest

T = TypeVar("T")


def decode_text(data: bytes, name: str) -> str:
    """UTF-8 bytes as text, a byte order mark left out.

    Args:
        data: the content of a file.
        name: of the file, for errors.

    Raises:
        ValueError: naming the line, and the byte that is not UTF-8, or the control character that belongs in no text.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{name}:{line}: not UTF-8 (byte {data[error.start]:#04x}); wanted text in UTF-8") from error
    for number, row in enumerate(text.split("\n"), 1):
        if odd := [letter for letter in row if unicodedata.category(letter) == "Cc" and letter not in "\t\r\f\v"]:
            raise ValueError(f"{name}:{number}: control character U+{ord(odd[0]):04X}; is this a text file in UTF-8?")
    return text


def read_text(file: Path) -> str:
    """A file of UTF-8 text; raises ``ValueError`` as :func:`decode_text` does."""
    return decode_text(file.read_bytes(), str(file))


def prompt_lines(text: str) -> list[str]:
    """A prompt a line; empty lines are passed over."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def json_lines(file: Path) -> dict[str, dict[str, Any]]:
    """Every object of a ``.jsonl`` by ``file:line``.

    Raises:
        ValueError: naming the line that is no object.
    """
    named = ((f"{file}:{number}", line) for number, line in enumerate(read_text(file).split("\n"), 1))
    return {where: _json_object(line, where) for where, line in named if line.strip()}


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {line.strip()[:60]}")
    return row


def read_prompts(file: Path, key: str = "text") -> list[str]:
    """The prompts of a ``.jsonl`` of objects (under ``key``), or of any other text file, one a line.

    Empty lines of a text file are passed over; ``""`` in a ``.jsonl`` is the empty prompt.

    Raises:
        ValueError: if there are none, or the file is no text; it names the line.
    """
    if file.suffix == ".jsonl":
        prompts = [row_value(row, key, str, where) for where, row in json_lines(file).items()]
    else:
        prompts = prompt_lines(read_text(file))
    if not prompts:
        raise ValueError(f"{file}: no prompts in it")
    return prompts


def row_value(row: dict[str, Any], key: str, kind: type[T], where: str) -> T:
    """``row[key]``; raises ``ValueError`` if it is not there, or not of this kind, ``str`` or ``int``."""
    if key not in row:
        raise ValueError(f"{where}: no key {key!r}{nearest(key, row)}")
    if type(row[key]) is not kind:  # not isinstance: true is no label
        raise ValueError(f"{where}: {key!r} is {row[key]!r}, expected {'text' if kind is str else 'a whole number'}")
    return row[key]
