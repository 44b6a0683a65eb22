"""Text of data files: UTF-8, without control characters, line by line; and the errors for damaged ones."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

from stepdistill.files.reading import parse_json, read_bytes

MAX_BYTES = 4 * 2**30
"""Bytes of one file of captions or prompts. It is larger than that of a configuration: a data set may have millions."""


CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")


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
    if found := CONTROL.search(text):
        line = text[: found.start()].count("\n") + 1
        raise ValueError(f"{name}:{line}: control character U+{ord(found[0]):04X}; expected text in UTF-8")
    return text


def read_text(file: Path) -> str:
    """Return the content of a UTF-8 file; raise ``ValueError`` as :func:`decode_text` does."""
    return decode_text(read_bytes(file, MAX_BYTES), str(file))


def lines(text: str) -> list[str]:
    r"""Return the lines of a text, which end in ``\n`` or ``\r\n`` and in nothing else.

    ``str.splitlines`` would also split at characters that stand inside captions, such as U+2028.

    >>> lines("one\u2028still one\r\ntwo\n")
    ['one\u2028still one', 'two']
    """
    found = [line.removesuffix("\r") for line in text.split("\n")]
    return found[:-1] if found[-1] == "" else found


def json_lines(file: Path, hint: Any = dict[str, Any]) -> dict[str, Any]:
    """Return the value of every line of a ``.jsonl`` by ``file:line``, as the type ``hint``.

    Raises:
        ValueError: naming the line that is not of this type.
    """
    rows = {}
    for number, line in enumerate(lines(read_text(file)), 1):
        if line.strip():
            where = f"{file}:{number}"
            rows[where] = parse_json(line, where, hint)
    return rows


def table_rows(file: Path) -> dict[str, dict[str, str]]:
    """Return the rows of a ``.csv`` or ``.tsv`` with a header by ``file:line``.

    In a ``.tsv`` quotes are those of a spreadsheet if all of them are, and otherwise letters like all others.

    Raises:
        ValueError: naming the line whose quotes or number of columns are wrong.
    """
    text = read_text(file)
    if file.suffix.lower() != ".tsv":
        return _rows(text, file, delimiter=",")
    try:
        return _rows(text, file, delimiter="\t")
    except ValueError:
        return _rows(text, file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _rows(text: str, file: Path, **form: Any) -> dict[str, dict[str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **form)
    rows: dict[str, dict[str, str]] = {}
    try:
        found = filter(None, reader)  # without blank lines
        header = next(found, [])
        for row in found:
            where = f"{file}:{reader.line_num}"
            if len(row) != len(header):
                raise ValueError(f"{where}: expected {len(header)} columns as in the first line, got {len(row)}")
            rows[where] = dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num}: {error}") from None
    return rows
