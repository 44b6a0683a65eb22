"""Configuration: YAML plus dotted overrides, turned into frozen dataclasses, strictly.

``1e-4`` is a number and ``no`` is a word (YAML 1.1 disagrees on both). Everything else is strict: a key given twice, an
unknown key, a wrong type and a missing value are errors, which are all reported at once, each with the nearest right
name.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """One or more problems in a configuration; ``problems`` lists them, one line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("invalid configuration:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


# ---------------------------------------------------------------------------------------------- reading


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 booleans and floats, and no duplicate keys."""


_YAML_1_1 = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_StrictLoader.yaml_implicit_resolvers = {}
for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _kept = [(tag, regexp) for tag, regexp in _resolvers if tag not in _YAML_1_1]
    _StrictLoader.yaml_implicit_resolvers[_first] = _kept
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|nan))$"
    ),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError([f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice"])
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def parse_yaml(text: str) -> Any:
    """Parse YAML text with the rules of this module.

    >>> parse_yaml("{lr: 1e-4, mixed_precision: no}")
    {'lr': 0.0001, 'mixed_precision': 'no'}
    """
    return yaml.load(text, Loader=_StrictLoader)


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> dict:
    """Read a YAML file and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: if the file is missing or malformed, or an override has no ``=``.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError([f"{path}: no such file{_nearest_file(path)}"])
    try:
        mapping = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except ConfigError as error:
        raise ConfigError(f"{path}: {problem}" for problem in error.problems) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not valid YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(mapping, dict):
        raise ConfigError([f"{path}: expected sections of keys, got {type(mapping).__name__}"])
    return apply_overrides(mapping, overrides)


def apply_overrides(mapping: Mapping, overrides: Iterable[str]) -> dict:
    """Return a copy of ``mapping`` with every ``a.b.c=value`` set; values are parsed as YAML."""
    result = copy.deepcopy(dict(mapping))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise ConfigError([f"override {override!r}: expected section.key=value"])
        *sections, key = dotted.split(".")
        node = result
        for section in sections:
            if not isinstance(node.setdefault(section, {}), dict):
                raise ConfigError([f"override {override!r}: {section!r} is a value, not a section"])
            node = node[section]
        node[key] = parse_yaml(text)
    return result


def _nearest_file(path: Path) -> str:
    names = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    return nearest(path.name, names)


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


def _build_dataclass(cls: Any, mapping: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(mapping, Mapping):
        problems.append(f"{where or 'config'}: expected a section of keys, got {mapping!r}")
        return None
    before = len(problems)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for key in mapping:
        if key not in fields:
            problems.append(f"{_join(where, key)}: unknown key{nearest(str(key), fields)}")
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _read(mapping[name], hints[name], _join(where, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(where, name)}: missing (expected {_describe(hints[name])})")
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


def _read_number(value: Any, hint: Any, where: str, problems: list[str]) -> float:
    if type(value) in (int, float) and math.isfinite(value):
        return float(value)
    problems.append(_mismatch(value, hint, where))
    return 0.0


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
        section[str(key)] = _read(item, get_args(hint)[1], _join(where, key), problems)
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
    int: _read_exactly,
    str: _read_exactly,
    float: _read_number,
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
    if origin is None:
        return _WORDS.get(hint, str(hint))
    return str(hint).replace("typing.", "")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


# ----------------------------------------------------------------------------------------------- writing


def to_dict(config: Any) -> Any:
    """Return a tree of dataclasses as plain YAML/JSON values."""
    match config:
        case Mapping():
            return {key: to_dict(value) for key, value in config.items()}
        case list() | tuple():
            return list(map(to_dict, config))
        case Path():
            return str(config)
    if not dataclasses.is_dataclass(config):
        return config
    tree = {}
    for field in dataclasses.fields(config):
        tree[field.name] = to_dict(getattr(config, field.name))
    return tree


def to_yaml(config: Any) -> str:
    """Return YAML text that :func:`parse_yaml` reads back to the same values."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def fingerprint_json(config: Any) -> str:
    """Return twelve hex digits that change when any value of ``config`` does."""
    text = json.dumps(to_dict(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ, in alphabetical order; a missing key counts as None."""
    return [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line ``key: was ..., is ...`` for every key whose value differs, in alphabetical order."""
    return [f"{key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in changed_keys(before, now)]


def flatten(config: Any, where: str = "") -> dict[str, Any]:
    """Return ``{"section.key": value}`` for every leaf of a configuration tree; an empty section is a leaf."""
    tree = to_dict(config)
    if not isinstance(tree, Mapping) or (where and not tree):
        return {where: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, _join(where, key))
    return leaves
