"""The files that travel with the package."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
FASHION = ASSETS / "fashion"
"""The embedded teacher, its data and its classifier."""

EMBEDDED = {"embedded": FASHION / "train_subset.npz", "emoji": ASSETS / "emoji/train.npz"}
"""Data sets, by what ``data.path`` calls them."""
