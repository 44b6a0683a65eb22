"""Configuration: YAML plus dotted overrides, turned into frozen dataclasses, strictly.

A configuration is written for people, so it is read the way people mean it: ``1e-4`` is a number and
``no`` is a word (YAML 1.1 disagrees on both). Everything else is strict. A key given twice, an unknown
key, a wrong type and a missing value are all errors, and all of them are reported at once, each with
the nearest name that would have been right.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import types
from collections.abc import Iterable, Mapping
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


_StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
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
        raise ConfigError([f"{path}: expected sections of keys, found {type(mapping).__name__}"])
    return apply_overrides(mapping, overrides)


def apply_overrides(mapping: Mapping, overrides: Iterable[str]) -> dict:
    """A copy of ``mapping`` with every ``a.b.c=value`` set; the value is parsed as YAML."""
    result = _copy_tree(mapping)
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


def _copy_tree(mapping: Mapping) -> dict:
    return {key: _copy_tree(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}


def _nearest_file(path: Path) -> str:
    names = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    return nearest(path.name, names)


def nearest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``names``, or the names themselves, or nothing.

    >>> nearest("progresive", ["progressive", "dmd2"])
    "; did you mean 'progressive'?"
    """
    names = sorted(names)
    matches = difflib.get_close_matches(name, names, n=1)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


# --------------------------------------------------------------------------------------------- building


def build(cls: type[T], mapping: Mapping | None, where: str = "") -> T:
    """Build the dataclass ``cls`` from a mapping, checking names and types recursively.

    A dataclass may check itself across fields in ``__post_init__`` by raising ``ValueError``.

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
        problems.append(f"{where or 'config'}: expected a section of keys, found {mapping!r}")
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
            values[name] = _coerce(mapping[name], hints[name], _join(where, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(where, name)}: missing (a {_describe(hints[name])} is required)")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(f"{where}: {error}" if where else str(error))
        return None


def _coerce(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """``value`` as ``hint``, or a problem."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(value, args, hint, where, problems)
    if origin is Literal:
        if value in args:
            return value
        problems.append(f"{where}: found {value!r}{nearest(str(value), [str(arg) for arg in args])}")
        return None
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, where, problems)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        items = [_coerce(item, args[0], f"{where}[{i}]", problems) for i, item in enumerate(value)]
        return origin(items)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): _coerce(item, args[1], _join(where, key), problems) for key, item in value.items()}
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if value == value and abs(value) != float("inf"):
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    problems.append(f"{where}: expected {_describe(hint)}, found {value!r}")
    return None


def _coerce_union(value: Any, options: tuple, hint: Any, where: str, problems: list[str]) -> Any:
    if value is None and type(None) in options:
        return None
    for option in options:
        attempt: list[str] = []
        result = _coerce(value, option, where, attempt)
        if option is not type(None) and not attempt:
            return result
    remaining = [option for option in options if option is not type(None)]
    if len(remaining) == 1:
        return _coerce(value, remaining[0], where, problems)
    problems.append(f"{where}: expected {_describe(hint)}, found {value!r}")
    return None


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in get_args(hint))
    if get_origin(hint) is None and isinstance(hint, type):
        return {float: "number", int: "whole number", str: "text", bool: "true/false"}.get(hint, hint.__name__)
    return str(hint).replace("typing.", "")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


# ----------------------------------------------------------------------------------------------- writing


def to_dict(config: Any) -> Any:
    """A dataclass tree as plain YAML/JSON values."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def to_yaml(config: Any) -> str:
    """YAML text that :func:`parse_yaml` reads back to the same values."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def fingerprint_json(config: Any) -> str:
    """Twelve hex digits that change when any value of ``config`` does."""
    text = json.dumps(to_dict(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line ``key: was ..., is ...`` for every key whose value differs, in alphabetical order."""
    lines = []
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            lines.append(f"{key}: was {before.get(key)!r}, is {now.get(key)!r}")
    return lines


def flatten(config: Any, where: str = "") -> dict[str, Any]:
    """``{"section.key": value}`` for every leaf of a configuration tree."""
    tree = to_dict(config)
    if not isinstance(tree, Mapping):
        return {where: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and bool(value)
        leaves.update(flatten(value, _join(where, key)) if nested else {_join(where, key): value})
    return leaves
