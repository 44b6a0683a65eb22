"""Settings of a model that name code, kernels, or weights elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepdistill.files.reading import read_json
from stepdistill.loading.pickles import is_plain

CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "custom_generate", "trust_remote_code")
"""Settings by which transformers and diffusers find Python code, in the folder or in any repository."""
KERNEL_KEYS = ("attn_implementation", "experts_implementation", "kernel_config")
"""Parts of the names of settings by which transformers finds kernels to download, if a value names a repository."""

MAX_NUMBER = 2**31
"""Largest whole number in a network's settings."""
LOOPS = {"layers": 1000, "blocks": 1000, "num_train_timesteps": 1_000_000}
"""Largest value, by a part of the key, of what is built one by one: more would fill the memory before it is refused."""


def refuse_settings(place: Path, permission: str, *, deep: bool = False) -> None:
    """Raise ``ValueError`` if the settings of a model name code, kernels, or weights elsewhere.

    Args:
        place: the folder with ``config.json``, ``tokenizer_config.json`` and the like.
        permission: what the user can do.
        deep: whether folders in it count, as of a processor's parts.
    """
    for path in sorted((place.rglob if deep else place.glob)("*config.json")):
        if path.name == "adapter_config.json":
            raise ValueError(f"{path}: expected a whole model, got an adapter, which names another; {permission}")
        settings = read_json(path, Any)
        refuse_endless(path, settings)
        for key, value in values_by_key(settings):
            if type(value) is int and value > MAX_NUMBER and path.name == "config.json":
                raise ValueError(f"{path}: {key}: expected at most {MAX_NUMBER:,}, got {value:,}")
            kernel = any(word in key for word in KERNEL_KEYS) and "/" in str(value)
            if (key in CODE_KEYS or kernel) and value:
                raise ValueError(f"{path}: {key}: names code that would run, {str(value)[:80]!r}; {permission}")
            if key == "transformers_weights" and value and not is_plain(value, ".safetensors"):
                raise ValueError(f"{path}: {key}: expected a .safetensors file in the folder, got {value!r}")


def refuse_endless(path: Path, settings: Any) -> None:
    """Raise ``ValueError`` if the settings in the file ``path`` ask for more layers or timesteps than any model has."""
    for key, value in values_by_key(settings):
        limit = next((most for word, most in LOOPS.items() if word in key), None)
        for number in value if type(value) is list else [value]:
            if limit is not None and type(number) in (int, float) and number > limit:
                raise ValueError(f"{path}: {key}: expected at most {limit:,}, got {number:,}")


def values_by_key(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield key and value of every object in a JSON value, at any depth."""
    waiting = [tree]
    while waiting:
        match waiting.pop():
            case dict() as section:
                yield from section.items()
                waiting += section.values()
            case list() as items:
                waiting += items
