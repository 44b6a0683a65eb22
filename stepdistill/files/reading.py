"""Text, JSON and YAML that come from outside: bounded, checked, and with the file's name in every error.

In YAML ``1e-4`` is a number and ``no`` is a word (YAML 1.1 disagrees on both), and no key may stand twice. Everything
that cannot be read as expected is a ``ValueError`` of one sentence: a missing file, a folder or a pipe in its place,
text that is not UTF-8, more bytes, values or nesting than any honest file has, a wrong type.
"""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from stepdistill.files.schema import ConfigError, convert, nearest

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 50
MAX_VALUES = 1_000_000
"""Limits of one file. Aliases count with all that they repeat."""


# ------------------------------------------------------------------------------------------------- text


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Return the content of a UTF-8 file.

    Raises:
        ValueError: if it is missing, no plain file, unreadable, larger than ``max_bytes``, or not UTF-8.
    """
    try:
        _check_file(path, max_bytes)
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a file whose text the caller decodes; raise ``ValueError`` as :func:`read_text` does."""
    try:
        _check_file(path, max_bytes)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_file(path: Path, max_bytes: int) -> None:
    if not path.exists():
        raise ValueError(f"{path}: no such file{_nearest_file(path)}")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: expected a file, got a {'folder' if path.is_dir() else 'special file'}")
    if status.st_size > max_bytes:
        raise ValueError(f"{path}: expected at most {max_bytes:,} bytes, got {status.st_size:,}")


def _nearest_file(path: Path) -> str:
    names = [entry.name for entry in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
    return nearest(path.name, names)


# ------------------------------------------------------------------------------------------------- JSON


def read_json(path: Path, hint: Any = dict[str, Any]) -> Any:
    """Return the content of a JSON file as the type ``hint``: a generic type, or a dataclass.

    Raises:
        ValueError: as :func:`read_text` and :func:`parse_json` do.
    """
    return parse_json(read_text(path), str(path), hint)


def parse_json(text: str, name: str, hint: Any = dict[str, Any], max_values: int = MAX_VALUES) -> Any:
    """Return JSON text as the type ``hint``; ``name`` is the file, and line or member, that errors begin with.

    A file of captions may hold more values (``max_values``) than any other.

    Raises:
        ValueError: if it is not JSON, exceeds the limits of this module, or has another type.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON, got {error}") from None
    return _checked(value, name, hint, max_values)


# ------------------------------------------------------------------------------------------------- YAML


def read_yaml(path: Path, hint: Any = dict[str, Any]) -> Any:
    """Return the content of a YAML file as the type ``hint``; an empty file is an empty section.

    Raises:
        ValueError: as :func:`read_text` does, or if it is not YAML, exceeds the limits, or has another type.
    """
    try:
        value = parse_yaml(read_text(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {problem}" for problem in error.problems) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError([f"{path}: not valid YAML: {' '.join(str(error).split())}"]) from None
    return _checked({} if value is None else value, str(path), hint)


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

    Raises:
        yaml.YAMLError: if it is not YAML.
        ConfigError: if a key stands twice.

    >>> parse_yaml("{lr: 1e-4, mixed_precision: no}")
    {'lr': 0.0001, 'mixed_precision': 'no'}
    """
    return yaml.load(text, Loader=_StrictLoader)


# ----------------------------------------------------------------------------------------------- limits


def _checked(value: Any, name: str, hint: Any, max_values: int = MAX_VALUES) -> Any:
    """Return ``value`` as the type ``hint`` if it is within the limits."""
    _check_limits(value, name, max_values)
    try:
        return convert(value, hint)
    except ConfigError as error:
        raise ConfigError(f"{name}: {problem}" for problem in error.problems) from None


def _check_limits(tree: Any, name: str, max_values: int) -> None:
    """Raise ``ValueError`` for more nesting or values than the limits of this module."""
    waiting, count = [(tree, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{name}: expected at most {MAX_DEPTH} levels, got more")
        if count > max_values:
            raise ValueError(f"{name}: expected at most {max_values:,} values, got more")
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
