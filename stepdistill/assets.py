"""Files: those that travel with the package, and writing one whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
FASHION = ASSETS / "fashion"
"""The embedded teacher, its data and its classifier."""

EMBEDDED = {"embedded": FASHION / "train_subset.npz", "emoji": ASSETS / "emoji/train.npz"}
"""Data sets, by what ``data.path`` calls them."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it takes the place of ``path`` if nothing was raised.

    A reader therefore sees the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
