"""One pass over a set of images, in chunks that processes share, that are kept, and that end up in order.

A chunk is :data:`CHUNK` consecutive images, whichever process makes it. A finished chunk is written to the work folder
as a whole, so that an interrupted evaluation continues where it stopped, also with another number of processes. Only
features are kept: thirty thousand large images would not fit in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.config import fingerprint_json
from stepdistill.evaluation.metrics.rows import FeatureRows
from stepdistill.evaluation.sources import Source
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.files.writing import atomic_write

CHUNK = 500
"""Images per chunk: fixed, since a file holds one, and the number of processes must not matter."""


def collect(source: Source, suite: MetricSuite, *, work: Path | None = None, identity: Any = None) -> dict[str, Tensor]:
    """Embed all images of ``source``, and return rows by name, in the order of the images.

    These are (N, ...) what :meth:`MetricSuite.embed` returns, and one row per chunk of ``calls`` (network calls per
    image), ``seconds`` (per image) and ``images`` (in the chunk).

    Args:
        source: the images.
        suite: embeds them.
        work: folder for finished chunks; None keeps nothing.
        identity: all that the chunks depend on; chunks of another identity lie in another sub-folder.
    """
    folder = None if work is None else work / fingerprint_json(identity)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "identity.json").write_text(json.dumps(identity, indent=2, default=str) + "\n", encoding="utf-8")
    rows = FeatureRows()
    rows.update({})  # a process without a chunk takes part in the gathering
    for start in own_chunks(source.count):
        rows.update(make_chunk(source, suite, start, folder))
    found: dict[str, Tensor] = rows.compute()
    for name, tensor in found.items():
        found[name] = torch.atleast_1d(tensor)  # torchmetrics squeezes single numbers
    return found


def own_chunks(count: int) -> list[int]:
    """Return the first index of each chunk of this process: consecutive ones, so that processes add up in order."""
    state = PartialState()
    starts = np.arange(0, count, CHUNK)
    return np.array_split(starts, state.num_processes)[state.process_index].tolist()


def make_chunk(source: Source, suite: MetricSuite, start: int, folder: Path | None) -> dict[str, Tensor]:
    """Return a chunk: read from ``folder`` if it is finished there, otherwise made, and kept."""
    path = None if folder is None else folder / f"chunk-{start:08d}.safetensors"
    if path is not None and path.is_file():
        try:
            return load_file(path)
        except SafetensorError:
            path.unlink()  # damaged: it is made again
    images = source.take(range(start, min(start + CHUNK, source.count)))
    chunk = {}
    for name, tensor in suite.embed(images).items():
        chunk[name] = tensor.contiguous()
    for name, value in (("calls", images.calls), ("seconds", images.seconds), ("images", len(images))):
        chunk[name] = torch.tensor([value], dtype=torch.float64)
    if path is not None:
        with atomic_write(path) as partial:
            save_file(chunk, partial)
    return chunk


def remove_chunks(work: Path) -> None:
    """Remove what :func:`collect` wrote, and the folders that are then empty; all else there is the user's."""
    for path in (*work.glob("*/chunk-*.safetensors"), *work.glob("*/identity.json")):
        path.unlink()
    for folder in (*work.glob("*/"), work):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
