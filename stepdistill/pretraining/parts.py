"""The folder of a teacher that is trained in parts: a part is complete or absent, and goes with its configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

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


def open_parts(folder: Path, config: Any, accelerator: Accelerator) -> None:
    """Check the parts in ``folder``, and note the configuration; raise ``ValueError`` as :func:`check_parts` does."""
    check_parts(folder, config)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_record(folder, config)


def make_part(folder: Path, accelerator: Accelerator, name: str, train: Callable[[Path], Any]) -> Path:
    """Return the folder of a part, which is trained unless it is there.

    Args:
        folder: of all parts.
        accelerator: of all processes, each of which calls this.
        name: of the part.
        train: takes the file of the losses, and returns what has ``save_pretrained``.
    """
    if not (folder / name).is_dir():
        made = train(folder / f"{name}.jsonl")
        if accelerator.is_main_process:
            made.save_pretrained(folder / f"{name}.partial")
    return finish_part(folder, name, accelerator)


def finish_part(folder: Path, name: str, accelerator: Accelerator) -> Path:
    """Give a part that was saved as ``<name>.partial`` its name, and return its folder.

    Every process waits, also where the part was there: a slower one may have come after it was made.
    """
    if accelerator.is_main_process and not (folder / name).is_dir():
        (folder / f"{name}.partial").replace(folder / name)
    accelerator.wait_for_everyone()
    return folder / name


def check_parts(folder: Path, config: Any) -> None:
    """Raise ``ValueError`` if a part in ``folder`` was made from one that is missing, or by another configuration."""
    for name, sources in MADE_FROM.items():
        for source in sources:
            if (folder / name).is_dir() and not (folder / source).is_dir():
                raise ValueError(f"{folder / name} was made from {source!r}, which is missing; move it away, too")
    record = folder / "config.json"
    if not record.is_file():
        return
    before, now = read_json(record), parts_config(config)
    for key in before | now:
        part = FIRST_PARTS.get(key.partition(".")[0], "")
        if part and (folder / part).is_dir() and before.get(key) != now.get(key):
            raise ValueError(
                f"{key}: {folder / part} was made with {shown(before.get(key))}, now {shown(now.get(key))}; move it "
                "and what was made from it away, choose another output_dir, or restore the value"
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
