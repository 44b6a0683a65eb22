"""Plain values turned into typed ones, strictly: all problems at once, each with the nearest right name."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """One or more problems in a configuration; ``problems`` lists them, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("invalid configuration:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


def nearest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``names``, or all names, or nothing.

    >>> nearest("progresive", ["progressive", "dmd2"])
    "; did you mean 'progressive'?"
    """
    names = sorted(names)
    known = f"; known: {', '.join(names)}" if names else ""
    return _closest(name, names) or known


def _closest(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``names``, or nothing."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


# --------------------------------------------------------------------------------------------- building


def build(cls: type[T], mapping: Mapping | None, where: str = "") -> T:
    """Build the dataclass ``cls`` from a mapping, and check names and types recursively.

    A dataclass may check its values in ``__post_init__`` by raising ``ValueError``.

    Raises:
        ConfigError: listing every problem found, not only the first.
    """
    problems: list[str] = []
    value = _build_dataclass(cls, {} if mapping is None else mapping, where, problems)
    if problems or value is None:
        raise ConfigError(problems)
    return value


def convert(value: Any, hint: Any, where: str = "content") -> Any:
    """Return a plain value as the type ``hint``: a generic type of plain ones, or a dataclass.

    Raises:
        ConfigError: listing every problem found.
    """
    problems: list[str] = []
    result = _read(value, hint, where, problems)
    if problems:
        raise ConfigError(problems)
    return result


def _build_dataclass(cls: Any, mapping: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(mapping, Mapping):
        problems.append(f"{where or 'config'}: expected a section of keys, got {mapping!r}")
        return None
    before = len(problems)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls, include_extras=True)
    for key in mapping:
        if key not in fields:
            problems.append(f"{join_keys(where, key)}: unknown key{nearest(str(key), fields)}")
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _read(mapping[name], hints[name], join_keys(where, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{join_keys(where, name)}: missing (expected {_describe(hints[name])})")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(f"{where}: {error}" if where else str(error))
        return None


def _read(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Return ``value`` as the type ``hint``, or add a problem."""
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, where, problems)
    return _READERS[get_origin(hint) or hint](value, hint, where, problems)


def _read_any(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    del hint, where, problems
    return value


def _read_exactly(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    if type(value) is not hint:  # not isinstance, because true is no whole number
        problems.append(_mismatch(value, hint, where))
    return value


def _read_integer(value: Any, hint: Any, where: str, problems: list[str]) -> int:
    if type(value) is int and abs(value) < 2**63:  # what tensors can hold
        return value
    problems.append(_mismatch(value, hint, where))
    return 0


def _read_number(value: Any, hint: Any, where: str, problems: list[str]) -> float:
    if type(value) in (int, float) and abs(value) <= sys.float_info.max:  # NaN is not, either
        return float(value)
    problems.append(_mismatch(value, hint, where))
    return 0.0


def _read_annotated(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Return a value of a type of :mod:`stepdistill.files.ranges` or :mod:`stepdistill.files.precision`."""
    kind, rule = get_args(hint)
    before = len(problems)
    result = _read(rule.plain(value), kind, where, problems)
    if len(problems) == before and result not in rule:
        problems.append(f"{where}: expected {rule}, got {value!r}")
    return result


def _read_literal(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    options = get_args(hint)
    if value not in options:
        problems.append(_mismatch(value, hint, where) + _closest(str(value), map(str, options)))
    return value


def _read_items(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, (list, tuple)):
        problems.append(_mismatch(value, hint, where))
        return None
    items = []
    for index, item in enumerate(value):
        items.append(_read(item, get_args(hint)[0], f"{where}[{index}]", problems))
    return get_origin(hint)(items)


def _read_section(value: Any, hint: Any, where: str, problems: list[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        problems.append(_mismatch(value, hint, where))
        return {}
    section = {}
    for key, item in value.items():
        section[str(key)] = _read(item, get_args(hint)[1], join_keys(where, key), problems)
    return section


def _read_union(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """Return ``value`` as the first option that it fits."""
    options = list(get_args(hint))
    if type(None) in options:
        options.remove(type(None))
        if value is None:
            return None
    if len(options) == 1:
        return _read(value, options[0], where, problems)
    for option in options:
        attempt: list[str] = []
        result = _read(value, option, where, attempt)
        if not attempt:
            return result
    problems.append(_mismatch(value, hint, where))
    return None


_READERS: dict[Any, Callable[[Any, Any, str, list[str]], Any]] = {
    Any: _read_any,
    bool: _read_exactly,
    int: _read_integer,
    str: _read_exactly,
    float: _read_number,
    Annotated: _read_annotated,
    Literal: _read_literal,
    tuple: _read_items,
    list: _read_items,
    dict: _read_section,
    Union: _read_union,
    types.UnionType: _read_union,
}
"""By type, or the origin of a generic one, the function that reads it."""


def _mismatch(value: Any, hint: Any, where: str) -> str:
    return f"{where}: expected {_describe(hint)}, got {value!r}"


_WORDS = {float: "number", int: "whole number", str: "text", bool: "true/false"}


def _describe(hint: Any) -> str:
    """Return a type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is Annotated:
        return _describe(args[0])
    if origin is dict:
        return "a section of keys"
    if origin is None:
        return _WORDS.get(hint, str(hint))
    return str(hint).replace("typing.", "")


def join_keys(where: str, key: Any) -> str:
    """Return the dotted name of a key in the section ``where``."""
    return f"{where}.{key}" if where else str(key)
