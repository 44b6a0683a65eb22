"""What people see of a result of ``evaluate``: a short table; the whole result stays in its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stepdistill.evaluation.metrics.table import directions
from stepdistill.files.words import visible

NOT_MEASURED = ("_low", "_high", "_std")
"""Endings of keys that belong to another number."""


class Line(NamedTuple):
    """A number of a result, as texts: its name, its value, its 95 % interval, and which way is better."""

    metric: str
    value: str
    interval: str
    better: str


def summary(result: Mapping[str, Any]) -> str:
    """Return the table of a result, below one line of what was measured on what."""
    table = aligned([Line("metric", "value", "95 %", "better"), *lines(result)])
    return f"{visible(str(result['name']))}\n{visible(measured_on(result['setting']))}\n\n{table}"


def lines(result: Mapping[str, Any]) -> list[Line]:
    """Return the numbers of a result: metrics, then costs, which have no interval."""
    better = {name: "higher" if higher else "lower" for name, higher in directions().items()}
    found = []
    for key, value in result.items():
        if type(value) in (int, float) and not key.endswith(NOT_MEASURED):
            spread = interval(result, key)
            shown = digits(value) if spread else number(value)
            found.append(Line(visible(key), shown, spread, better.get(key, "")))
    return sorted(found, key=lambda line: not (line.better or line.interval))


def interval(result: Mapping[str, Any], key: str) -> str:
    """Return a number's 95 % interval, or its standard deviation over parts; empty where neither is known."""
    if f"{key}_low" in result and f"{key}_high" in result:
        return f"{digits(result[f'{key}_low'])} - {digits(result[f'{key}_high'])}"
    return f"std {digits(result[f'{key}_std'])}" if f"{key}_std" in result else ""


def digits(value: float) -> str:
    """Return four digits of a number, zeros too.

    >>> digits(0.22), digits(9.2182), digits(0.00012345), digits(1234.0)
    ('0.2200', '9.218', '0.0001234', '1234')
    """
    return f"{value:#.4g}".removesuffix(".")


def number(value: float) -> str:
    """Return four digits of a number, or all of a whole one.

    >>> number(0.22), number(1234567), number(1.0), number(float("nan"))
    ('0.2200', '1,234,567', '1', 'nan')
    """
    return f"{int(value):,}" if float(value).is_integer() else digits(value)


def measured_on(setting: Mapping[str, Any]) -> str:
    """Return the samples and the networks of a result in a few words, as far as its setting tells them."""
    words = []
    if type(setting.get("num_samples")) is int:
        words.append(f"{setting['num_samples']:,} images")
    if setting.get("seed") is not None:
        words.append(f"seed {setting['seed']}")
    for part in ("features", "clip"):
        about = setting.get(part)
        if type(about) is dict and "name" in about:
            words.append(f"{part} {about['name']}")
    return ", ".join(words)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of texts in columns, the first and the last to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = []
    for first, *middle, last in rows:
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(middle, widths[1:-1], strict=True)]
        shown.append("  ".join([*cells, last]).rstrip())
    return "\n".join(shown)
