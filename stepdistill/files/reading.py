"""Text, JSON and YAML that come from outside: bounded, checked, and with the file's name in every error.

In YAML ``1e-4`` is a number and ``no`` is a word (YAML 1.1 disagrees on both), and no key may stand twice. Everything
that cannot be read as expected is a ``ValueError`` of one sentence: a missing file, a folder or a pipe in its place,
text that is not UTF-8, more bytes, values or nesting than any honest file has, a key given twice, a wrong type.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stepdistill.files.schema import ConfigError, convert
from stepdistill.files.words import nearest, no_letter, shortened, shown

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 50
MAX_VALUES = 1_000_000
"""Limits of one file. Aliases count with all that they repeat."""
MAX_YAML_BYTES = 2**20
"""People write YAML, and its parser reads a megabyte in ten seconds."""
MAX_NUMBER = 10**40
"""Whole numbers are smaller; tokenizers write 10**30 for "no limit"."""


# ------------------------------------------------------------------------------------------------- text


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Return the content of a UTF-8 file, with or without a byte order mark; all line ends are line feeds.

    Raises:
        ValueError: as :func:`read_bytes` does, or if it is not UTF-8.
    """
    content = read_bytes(path, max_bytes)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got byte {content[error.start]:#04x}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a file whose text the caller decodes.

    Raises:
        ValueError: if it is missing, no plain file, unreadable, or larger than ``max_bytes``.
    """
    check_file(path, max_bytes)
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(content) > max_bytes:
        raise ValueError(f"{path}: expected at most {max_bytes:,} bytes, got more")
    return content


def check_file(path: Path, max_bytes: int) -> None:
    """Raise ``ValueError`` unless ``path`` is a plain file (no folder, no pipe) of at most ``max_bytes``."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file{_nearest_file(path)}") from None
    except (OSError, ValueError) as error:  # no permission, a loop of links, a name that no file can have
        raise ValueError(f"{shortened(str(path))}: cannot be read: {error.args[-1]}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "special file"
        raise ValueError(f"{path}: expected a file, got a {kind}")
    if status.st_size > max_bytes:
        raise ValueError(f"{path}: expected at most {max_bytes:,} bytes, got {status.st_size:,}")


def _nearest_file(path: Path) -> str:
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, 1000) if entry.name.endswith(path.suffix)]
    except OSError:
        return ""
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
        value = json.loads(text, object_pairs_hook=_section_without_duplicates)
    except RecursionError:
        raise ValueError(f"{name}: expected at most {MAX_DEPTH} levels, got more") from None
    except ValueError as error:
        raise ValueError(f"{name}: expected JSON, got {error}") from None
    return _converted(value, name, hint, max_values)


def _section_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section = dict(pairs)
    if len(section) == len(pairs):
        return section
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {shown(key)} twice")
        seen.add(key)
    raise AssertionError("one key is there twice")


# ------------------------------------------------------------------------------------------------- YAML


def read_yaml(path: Path, hint: Any = dict[str, Any]) -> Any:
    """Return the content of a YAML file as the type ``hint``; an empty file is an empty section.

    Raises:
        ValueError: as :func:`read_text` and :func:`parse_yaml` do, or if it has another type.
    """
    try:
        value = parse_yaml(read_text(path, MAX_YAML_BYTES))
    except ConfigError as error:
        raise ConfigError(f"{path}: {problem}" for problem in error.problems) from None
    return _converted({} if value is None else value, str(path), hint)


def parse_yaml(text: str) -> Any:
    """Parse YAML text with the rules of this module; all keys are text.

    Raises:
        ConfigError: if it is not YAML, has a key twice, or exceeds the limits.

    >>> parse_yaml("{lr: 1e-4, mixed_precision: no}")
    {'lr': 0.0001, 'mixed_precision': 'no'}
    """
    try:
        value = yaml.load(text, Loader=_StrictLoader)
        for found in _walk(value, MAX_VALUES):
            if type(found) is str and (letter := no_letter(found)):
                raise _Refused(f"expected text, got {letter}, in {shown(found)}")
    except yaml.YAMLError as error:
        raise ConfigError([f"not valid YAML: {shortened(' '.join(str(error).split()))}"]) from None
    except RecursionError:
        raise ConfigError([f"expected at most {MAX_DEPTH} levels, got more"]) from None
    except _Refused as error:
        raise ConfigError([str(error)]) from None
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 booleans and numbers (``010`` is text), no dates, no duplicate keys, and no types beyond JSON's."""


_TAG = "tag:yaml.org,2002:"
_NOT_READ = [_TAG + name for name in ("bool", "int", "float", "timestamp", "merge", "value")]
_StrictLoader.yaml_implicit_resolvers = {}
for _first, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _kept = [(tag, regexp) for tag, regexp in _resolvers if tag not in _NOT_READ]
    _StrictLoader.yaml_implicit_resolvers[_first] = _kept
_StrictLoader.add_implicit_resolver(
    f"{_TAG}int", re.compile(r"^[-+]?(?:0|[1-9][\d_]*|0x[\da-fA-F]+)$"), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.[\d_]*(?:[eE][-+]?\d+)?|\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|nan))$"
    ),
    list("-+0123456789."),
)


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[str, Any]:
    section: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line, key = key_node.start_mark.line + 1, key_node.value
        if type(key_node) is not yaml.ScalarNode:
            raise _Refused(f"line {line}: expected a word as key, got a {key_node.id}")
        if key in section:
            raise _Refused(f"line {line}: the key {shown(key)} is given twice")
        section[key] = loader.construct_object(value_node, deep=True)
    return section


def _scalar(loader: _StrictLoader, node: yaml.ScalarNode) -> Any:
    """Return a null, number or truth value; ``!!int`` and the like can demand one where there is none."""
    try:
        return yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    except (ValueError, KeyError, IndexError):
        name = node.tag.removeprefix(_TAG)
        raise _Refused(
            f"line {node.start_mark.line + 1}: expected a value of type {name}, got {shown(node.value)}"
        ) from None


_StrictLoader.yaml_constructors = {
    f"{_TAG}map": _mapping_without_duplicates,
    **{f"{_TAG}{name}": _scalar for name in ("null", "bool", "int", "float")},
    **{f"{_TAG}{name}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{name}"] for name in ("str", "seq")},
    None: yaml.SafeLoader.construct_undefined,
}


# ----------------------------------------------------------------------------------------------- limits


class _Refused(ValueError):
    """A limit that is exceeded, or what the rules of this module do not allow; without the file's name."""


def _converted(value: Any, name: str, hint: Any, max_values: int = MAX_VALUES) -> Any:
    """Return ``value`` as the type ``hint`` if it is within the limits."""
    try:
        for _ in _walk(value, max_values):
            pass
        return convert(value, hint)
    except ConfigError as error:
        raise ConfigError(f"{name}: {problem}" for problem in error.problems) from None
    except _Refused as error:
        raise ValueError(f"{name}: {error}") from None


def _walk(tree: Any, max_values: int) -> Iterator[Any]:
    """Yield every key and value; raise for more of them, and more nesting, than any honest file has."""
    waiting, count = [(tree, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise _Refused(f"expected at most {MAX_DEPTH} levels, got more")
        if count > max_values:
            raise _Refused(f"expected at most {max_values:,} values, got more")
        if type(value) is int and abs(value) > MAX_NUMBER:
            raise _Refused(f"expected a number below 1e40, got one of {value.bit_length()} bits")
        if type(value) is dict:
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif type(value) is list:
            waiting += [(item, depth + 1) for item in value]
        yield value
