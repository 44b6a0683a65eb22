"""Files of prompts and captions, and the errors for damaged ones."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any, TypeVar

from stepdistill.files.schema import nearest

T = TypeVar("T")


def decode_text(data: bytes, name: str) -> str:
    """Return UTF-8 bytes as text, without a byte order mark.

    Args:
        data: the content of a file.
        name: name of the file, for errors.

    Raises:
        ValueError: naming the line, and the byte that is not UTF-8 or the control character.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{name}:{line}: not UTF-8 (byte {data[error.start]:#04x}); expected text in UTF-8") from error
    for number, row in enumerate(text.split("\n"), 1):
        for letter in row:
            if unicodedata.category(letter) == "Cc" and letter not in "\t\r\f\v":
                raise ValueError(f"{name}:{number}: control character U+{ord(letter):04X}; expected text in UTF-8")
    return text


def read_text(file: Path) -> str:
    """Return the content of a UTF-8 file; raise ``ValueError`` as :func:`decode_text` does."""
    return decode_text(file.read_bytes(), str(file))


def prompt_lines(text: str) -> list[str]:
    """Return one prompt per line, without empty ones."""
    return list(filter(None, map(str.strip, text.splitlines())))


def json_lines(file: Path) -> dict[str, dict[str, Any]]:
    """Return every object of a ``.jsonl`` by ``file:line``.

    Raises:
        ValueError: naming the line that is not an object.
    """
    rows = {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            rows[where] = json_object(line, where)
    return rows


def json_object(text: str, where: str) -> dict[str, Any]:
    """Return a JSON object; raise ``ValueError`` naming ``where`` if the text is not one."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {text.strip()[:60]}")
    return row


def read_prompts(file: Path, key: str = "text") -> list[str]:
    """Return the prompts of a ``.jsonl`` of objects (under ``key``), or of any other text file, one a line.

    Empty lines of a text file are ignored; ``""`` in a ``.jsonl`` is the empty prompt.

    Raises:
        ValueError: if there are none, or the file is not text; it names the line.
    """
    if file.suffix == ".jsonl":
        prompts = [row_value(row, key, str, where) for where, row in json_lines(file).items()]
    else:
        prompts = prompt_lines(read_text(file))
    if not prompts:
        raise ValueError(f"{file}: no prompts in it")
    return prompts


def row_value(row: dict[str, Any], key: str, kind: type[T], where: str) -> T:
    """Return ``row[key]``; raise ``ValueError`` if it is missing, or not of this kind, ``str`` or ``int``."""
    if key not in row:
        raise ValueError(f"{where}: no key {key!r}{nearest(key, row)}")
    if type(row[key]) is not kind:  # not isinstance, because true is no label
        expected = "text" if kind is str else "a whole number"
        raise ValueError(f"{where}: {key!r}: expected {expected}, got {row[key]!r}")
    return row[key]
