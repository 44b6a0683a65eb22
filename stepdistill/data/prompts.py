"""Files of prompts: what ``data.path`` of ``prompts``, ``--prompt_file``, ``--captions`` and ``pairs.prompts`` read.

==================  =================================================================================================
suffix              prompts
==================  =================================================================================================
``.csv``, ``.tsv``  a header, and the column ``text``, ``prompt`` or ``caption``, in capitals or not
``.jsonl``          a text or an object a line
``.json``           a list of texts or objects, or an object whose ``annotations`` are one, as COCO has its captions
any other           one a line
==================  =================================================================================================

An object has its prompt under ``text``, ``prompt`` or ``caption``, or under the key that is asked for. Where it is a
list of several, training draws one on every visit, and everything else takes the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stepdistill.data.columns import Texts, read_texts
from stepdistill.data.text import json_lines, lines, read_text, table_rows
from stepdistill.files.reading import parse_json
from stepdistill.files.schema import convert

MAX_VALUES = 50_000_000
"""Values of one ``.json``; those of COCO's captions for training are three million."""


KEYS = ("text", "prompt", "caption")
"""Names of a column of prompts, in the order in which they are looked for."""


def prompt_lines(text: str) -> list[str]:
    """Return one prompt per line, without empty ones."""
    return list(filter(None, map(str.strip, lines(text))))


def read_prompts(file: Path, key: str | None = None) -> list[Texts]:
    """Return the prompts of a file, in any of the forms above.

    Empty lines and empty cells are left out; ``""`` in JSON is the empty prompt.

    Args:
        file: the file.
        key: the column of the prompts; one of the usual ones by default.

    Raises:
        ValueError: if there are none, one is missing, or the file is not of its form; it names the line.
    """
    rows = prompt_rows(file, key)
    found = list(rows.values())
    if not file.suffix.lower().startswith(".json"):
        found = [(prompt,) for texts in found if (prompt := texts[0].strip())]
    if not found:
        raise ValueError(f"{file}: no prompts in it")
    return found


def first_prompts(file: Path) -> list[str]:
    """Return the prompts of a file as :func:`read_prompts`, of several the first."""
    return [texts[0] for texts in read_prompts(file)]


def prompt_rows(file: Path, key: str | None = None) -> dict[str, Texts]:
    """Return the prompts of a file as written, blank ones too, by ``file:line`` or ``file[row]``.

    Raises:
        ValueError: as :func:`read_prompts`.
    """
    match file.suffix.lower():
        case ".csv" | ".tsv":
            return _of_columns(table_rows(file), file, key)
        case ".jsonl":
            return _of_values(json_lines(file, str | dict[str, Any]), key)
        case ".json":
            return _of_values(_json_rows(file), key)
    rows = enumerate(lines(read_text(file)), 1)
    return {f"{file}:{number}": (line,) for number, line in rows}


def _json_rows(file: Path) -> dict[str, Any]:
    rows = list[str | dict[str, Any]]
    content = parse_json(read_text(file), str(file), rows | dict[str, Any], MAX_VALUES)
    if isinstance(content, dict):
        content = convert(content.get("annotations"), rows, f"{file}: annotations")
    return {f"{file}[{row}]": value for row, value in enumerate(content)}


def _of_columns(rows: Mapping[str, Mapping[str, str]], file: Path, key: str | None) -> dict[str, Texts]:
    """Return the column of prompts; all rows have the same columns."""
    header = list(next(iter(rows.values()), ()))
    if not header:
        return {}
    name = find_column(header, key, f"{file}:1")
    return {where: (row[name],) for where, row in rows.items()}


def _of_values(rows: Mapping[str, Any], key: str | None) -> dict[str, Texts]:
    prompts = {}
    for where, value in rows.items():
        if isinstance(value, dict):
            value = value[find_column(value, key, where)]
        prompts[where] = read_texts(value, where)
        if not prompts[where]:
            raise ValueError(f"{where}: no prompt, but a null or an empty list ('' is the empty prompt)")
    return prompts


def find_column(names: Iterable[str], asked: str | None, where: str) -> str:
    """Return the column that is asked for, or the first of the usual ones, in capitals or not.

    Raises:
        ValueError: if there is none.
    """
    by_lower = {name.strip().lower(): name for name in reversed(list(names))}
    wanted = KEYS if asked is None else (asked.strip().lower(),)
    for name in wanted:
        if name in by_lower:
            return by_lower[name]
    found = ", ".join(by_lower.values())
    expected = f"a column {', '.join(KEYS[:-1])} or {KEYS[-1]}" if asked is None else f"the column {asked!r}"
    raise ValueError(f"{where}: expected {expected}, got {found[:100] or 'none'}")
