"""Configuration: YAML plus dotted overrides, turned into frozen dataclasses, strictly."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from stepdistill.files.reading import MAX_DEPTH, parse_yaml, read_yaml
from stepdistill.files.schema import ConfigError, join_keys
from stepdistill.files.words import shown

QUICK = "quick"
"""The budget of a file's own sections."""


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> dict:
    """Read a YAML file in one of its budgets, and apply ``section.key=value`` overrides.

    The override ``budget=full`` lays the keys under ``budgets.full`` over those of the file, before all others.

    Raises:
        ValueError: if the file is missing or malformed, has no such budget, or an override has no ``=``.
    """
    budget, others = QUICK, []
    for override in overrides:
        if override.startswith("budget="):
            budget = override.removeprefix("budget=")
        else:
            others.append(override)
    return apply_overrides(_in_budget(read_yaml(Path(path)), budget), others)


def _in_budget(mapping: Mapping, budget: str) -> dict:
    rest = dict(mapping)
    budgets = rest.pop("budgets", {})
    if type(budgets) is not dict:
        raise ConfigError([f"budgets: expected a section of keys, got {shown(budgets)}"])
    if budget == QUICK:
        return rest
    if type(budgets.get(budget)) is not dict:
        known = ", ".join([QUICK, *map(str, budgets)])
        raise ConfigError([f"budget: expected one of {known}, got {shown(budget)}"])
    return _laid_over(rest, budgets[budget])


def _laid_over(below: Mapping, above: Mapping) -> dict:
    """Return ``below`` with the keys of ``above``, section by section."""
    merged = dict(below)
    for key, value in above.items():
        both = type(value) is dict and type(merged.get(key)) is dict
        merged[key] = _laid_over(merged[key], value) if both else value
    return merged


def apply_overrides(mapping: Mapping, overrides: Iterable[str]) -> dict:
    """Return a copy of ``mapping`` with every ``a.b.c=value`` set; values are parsed as YAML.

    Raises:
        ConfigError: naming the override at fault.
    """
    result = copy.deepcopy(dict(mapping))
    for override in overrides:
        dotted, equals, text = override.partition("=")
        *sections, key = dotted.split(".")
        if not equals or "" in (*sections, key) or len(sections) > MAX_DEPTH:
            raise ConfigError([f"override {shown(override)}: expected section.key=value"])
        node = result
        for section in sections:
            if node.get(section) is None:  # an empty section
                node[section] = {}
            if type(node[section]) is not dict:
                raise ConfigError([f"override {shown(override)}: {section!r} is a value, not a section"])
            node = node[section]
        node[key] = _parse_value(override, text)
    return result


def section(given: Any, defaults: Mapping[str, Any] = MappingProxyType({}), **keys: Any) -> Any:
    """Return a section between its defaults and the keys that stand above it; None is an empty one.

    What is no section stays as it is, for :func:`~stepdistill.files.schema.build` to refuse by its name.
    """
    own = {} if given is None else given
    return {**defaults, **own, **keys} if type(own) is dict else own


def _parse_value(override: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"override {shown(override)}: {problem}" for problem in error.problems) from None


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
        leaves |= flatten(value, join_keys(where, key))
    return leaves
