"""Plain values turned into typed ones, strictly: all problems at once, each with the nearest right name.

A dataclass is a closed section: a key that it does not have is a problem, in a configuration because it is a typing
error, and in a file of ours because a newer version may mean something by it that must not be passed over. A TypedDict
is an open section: its keys are checked, and others are kept as they are.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)  # fmt: skip

from stepdistill.files.words import LISTED, closest, nearest, no_letter, shortened, shown, visible

T = TypeVar("T")

MAX_WHOLE = 2**63
"""Whole numbers are smaller: tensors hold no others."""


class ConfigError(ValueError):
    """One or more problems in a configuration or a file; ``problems`` lists them, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(map(visible, problems))
        lines = self.problems[:LISTED]
        if len(self.problems) > LISTED:
            lines.append(f"and {len(self.problems) - LISTED} more")
        many = f"{len(self.problems)} problems:" + "".join(f"\n  - {line}" for line in lines)
        super().__init__(many if len(self.problems) > 1 else "".join(lines))


def refuse_unread(section: Any, names: Collection[str], unread: object, where: str) -> None:
    """Raise ``ValueError`` if nothing reads these keys of a section, and one of them is not at its default.

    Args:
        section: a dataclass.
        names: of the keys.
        unread: whether nothing reads them.
        where: when that is, in words that follow "expected <default>".
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if unread and field.name in names and value != field.default:
            raise ValueError(f"{field.name}: expected {field.default!r} {where}, got {value!r}")


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


def convert(value: Any, hint: Any, where: str = "") -> Any:
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
        problems.append(f"{where or 'config'}: expected a section of keys, got {shown(mapping)}")
        return None
    before = len(problems)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls, include_extras=True)
    unknown = [str(key) for key in mapping if key not in fields]
    for key in unknown[:LISTED]:
        problems.append(f"{join_keys(where, key)}: unknown key{nearest(key, fields)}")
    if len(unknown) > LISTED:
        problems.append(f"{where or 'config'}: {len(unknown) - LISTED} more unknown keys")
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
    if is_typeddict(hint):
        return _read_open_section(value, hint, where, problems)
    return _READERS[get_origin(hint) or hint](value, hint, where, problems)


def _read_any(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    del hint, where, problems
    return value


def _read_exactly(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    if type(value) is not hint:  # not isinstance, because true is no whole number
        problems.append(_mismatch(value, hint, where))
    return value


def _read_text(value: Any, hint: Any, where: str, problems: list[str]) -> str:
    if type(value) is not str:
        problems.append(_mismatch(value, hint, where))
    elif letter := no_letter(value):
        problems.append(f"{where or 'content'}: expected text, got {letter}, in {shown(value)}")
    return value


def _read_whole_number(value: Any, hint: Any, where: str, problems: list[str]) -> int:
    if type(value) is int and abs(value) < MAX_WHOLE:
        return value
    problems.append(_mismatch(value, hint, where) + (", which is too large" if type(value) is int else ""))
    return 0


def _read_number(value: Any, hint: Any, where: str, problems: list[str]) -> float:
    if type(value) in (int, float) and abs(value) <= sys.float_info.max:  # false for NaN
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
    if not any(value == option and type(value) is type(option) for option in options):
        problems.append(_mismatch(value, hint, where) + closest(str(value), map(str, options)))
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


def _read_open_section(value: Any, hint: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """Return a section with the keys of a TypedDict read, and all others as they are."""
    section = _read_section(value, dict[str, Any], where, problems)
    for key, kind in get_type_hints(hint, include_extras=True).items():
        optional = get_origin(kind) is NotRequired
        kind = get_args(kind)[0] if optional else kind
        if key in section:
            section[key] = _read(section[key], kind, join_keys(where, key), problems)
        elif not optional:
            problems.append(f"{join_keys(where, key)}: missing (expected {_describe(kind)})")
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
    told: list[str] = []
    for option in options:
        attempt: list[str] = []
        result = _read(value, option, where, attempt)
        if not attempt:
            return result
        if attempt != [_mismatch(value, option, where)]:  # more than that the type is another
            told += attempt
    problems += told or [_mismatch(value, hint, where)]
    return None


_READERS: dict[Any, Callable[[Any, Any, str, list[str]], Any]] = {
    Any: _read_any,
    bool: _read_exactly,
    int: _read_whole_number,
    str: _read_text,
    float: _read_number,
    Annotated: _read_annotated,
    Literal: _read_literal,
    tuple: _read_items,
    list: _read_items,
    dict: _read_section,
    Mapping: _read_section,
    Union: _read_union,
    types.UnionType: _read_union,
}
"""By type, or the origin of a generic one, the function that reads it."""


def _mismatch(value: Any, hint: Any, where: str) -> str:
    return f"{where or 'content'}: expected {_describe(hint)}, got {shown(value)}"


_WORDS = {float: "number", int: "whole number", str: "text", bool: "true/false", type(None): "null"}


def _describe(hint: Any) -> str:
    """Return a type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is Annotated:
        return _describe(args[0])
    if origin in (tuple, list):
        entry = _describe(args[0])
        return f"a list of {entry}s" if entry in _WORDS.values() else f"a list, each entry {entry}"
    if origin in (dict, Mapping) or is_typeddict(hint) or dataclasses.is_dataclass(hint):
        return "a section of keys"
    if origin is None:
        return _WORDS.get(hint, str(hint))
    return str(hint).replace("typing.", "")


def join_keys(where: str, key: Any) -> str:
    """Return the dotted name of a key in the section ``where``."""
    word = shortened(str(key))
    return f"{where}.{word}" if where else word
