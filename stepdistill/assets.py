"""Files of the package."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
FASHION = ASSETS / "fashion"
"""Folder of the embedded teacher, its data and its classifier."""

EMBEDDED = {"embedded": FASHION / "train_subset.npz", "emoji": ASSETS / "emoji/train.npz"}
"""Embedded data sets, by their ``data.path``."""
