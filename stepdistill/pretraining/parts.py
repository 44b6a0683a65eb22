"""The folder of a teacher that is trained in parts: a part is complete or absent, and goes with its configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stepdistill.config import flatten
from stepdistill.files.reading import read_json
from stepdistill.files.words import shown
from stepdistill.files.writing import atomic_write

MADE_FROM = {"clip": ["tokenizer"], "judge": ["tokenizer"], "unet": ["vae", "clip"], "pipeline": ["unet"]}
"""The parts that others are made from."""

FIRST_PARTS = {
    "data": "tokenizer", "vocabulary": "tokenizer", "max_tokens": "tokenizer", "vae": "vae", "attributes": "vae",
    "clip": "clip", "shift": "clip", "judge": "judge", "unet": "unet", "scheduler": "unet", "caption_dropout": "unet",
    "together": "pipeline",
}  # fmt: skip
"""The first part that depends on a section or key of the configuration."""

FREE_KEYS = ("log_every", "save_every", "num_workers")
"""Last names of keys that change no part."""


def check_parts(folder: Path, config: Any) -> None:
    """Raise ``ValueError`` if a part in ``folder`` was made from one that is missing, or by another configuration."""
    for name, sources in MADE_FROM.items():
        for source in sources:
            if (folder / name).is_dir() and not (folder / source).is_dir():
                raise ValueError(f"{folder / name} was made from {source!r}, which is missing; move it away, too")
    record = folder / "config.json"
    if not record.is_file():
        return
    before = read_json(record)
    for key, value in parts_config(config).items():
        part = FIRST_PARTS[key.partition(".")[0]]
        if (folder / part).is_dir() and before.get(key) != value:
            raise ValueError(
                f"{key}: {folder / part} was made with {shown(before.get(key))}, now {shown(value)}; move it and what "
                "was made from it away, choose another output_dir, or restore the value"
            )


def write_record(folder: Path, config: Any) -> None:
    """Write the configuration that :func:`check_parts` compares with."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "config.json") as partial:
        partial.write_text(json.dumps(parts_config(config), indent=2), encoding="utf-8")


def parts_config(config: Any) -> dict[str, Any]:
    """Return the values that decide what the parts become, as JSON has them."""
    return json.loads(json.dumps(dict(_deciding(flatten(config)))))


def _deciding(leaves: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in leaves.items():
        if key.partition(".")[0] in FIRST_PARTS and key.rpartition(".")[2] not in FREE_KEYS:
            yield key, value
