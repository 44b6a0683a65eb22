"""What may be said in public of where a student comes from: names and licences, never a path of the user's machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.families.hub import HUB_ID, expand_home, is_path
from stepdistill.files.reading import parse_yaml, read_text

LICENSE_KEYS = ("license", "license_name", "license_link")
"""What a model card on the hub says of a licence; ``other`` has a name and a link."""


def hub_id(path: str | None) -> str | None:
    """Return a path of a configuration if it is a model or a data set on the hub, and no file or folder here."""
    if path is None or HUB_ID.fullmatch(path) is None or is_path(path) or expand_home(path).exists():
        return None
    return path


def public_name(path: str) -> str:
    """Return the id on the hub, or the last part of a path; of a signed address without its signature.

    >>> public_name("/data/somebody/teachers/faces"), public_name("stabilityai/sdxl"), public_name("embedded")
    ('faces', 'stabilityai/sdxl', 'embedded')
    >>> public_name("https://host/faces.tar?signature=1")
    'faces.tar'
    """
    plain = path.partition("?")[0] if "://" in path else path
    return hub_id(plain) or Path(plain).name


def with_names(value: Any) -> Any:
    """Return a JSON value, all of whose texts are names or paths, with names alone; keys stay.

    >>> with_names({"<cat>": "words/cat.safetensors", "weights": [0.5]})
    {'<cat>': 'cat.safetensors', 'weights': [0.5]}
    """
    if type(value) is dict:
        return {key: with_names(old) for key, old in value.items()}
    if type(value) is list:
        return list(map(with_names, value))
    return public_name(value) if type(value) is str else value


def without_paths(value: Any) -> Any:
    """Return a JSON value with names in place of paths: those of this machine, and where a part was loaded from.

    >>> without_paths({"_name_or_path": "runs/teacher/vae", "file": f"{Path.cwd()}/a.json", "pad": "/", "n": [1]})
    {'_name_or_path': 'vae', 'file': 'a.json', 'pad': '/', 'n': [1]}
    """
    if type(value) is dict:
        return {key: public_name(old) if _is_origin(key, old) else without_paths(old) for key, old in value.items()}
    if type(value) is list:
        return list(map(without_paths, value))
    return public_name(value) if type(value) is str and _is_place(value) else value


def _is_origin(key: str, value: Any) -> bool:
    return key in ("_name_or_path", "name_or_path") and type(value) is str


def _is_place(text: str) -> bool:
    """Return whether text is an absolute path in a folder of this machine."""
    path = Path(text)
    return len(text) < 1000 and path.is_absolute() and len(path.parts) > 2 and path.parent.is_dir()


def teacher_license(folder: Path) -> dict[str, str]:
    """Return the licence in the front matter of a teacher's ``README.md``; empty if it says none that can be read."""
    try:
        found = parse_yaml(_front_matter(read_text(folder / "README.md")))
    except ValueError:
        return {}
    facts = {key: value for key, value in _section(found).items() if key in LICENSE_KEYS and type(value) is str}
    return facts if re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", facts.get("license", "")) else {}


def _front_matter(text: str) -> str:
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.DOTALL)
    return found[1] if found else ""


def _section(found: Any) -> Mapping[str, Any]:
    return found if type(found) is dict else {}
