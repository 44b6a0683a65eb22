"""Files of the package."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
FASHION = ASSETS / "fashion"
"""Folder of the embedded teachers, their data and their classifier."""
FACES = ASSETS / "faces"
"""Folder of faces with captions, their text-to-image teacher, and the networks that measure them."""

TEACHERS = {"embedded": FASHION / "teacher", "embedded-flow": FASHION / "flow_teacher", "faces": FACES / "teacher"}
"""Embedded teachers, by their ``teacher.path``."""

EMBEDDED = {
    "embedded": FASHION / "train_subset.npz",
    "faces": FACES / "train.npz",
    "faces-held-out": FACES / "held_out.npz",
    "faces-prompts": FACES / "prompts.txt",
}
"""Embedded data sets, by their ``data.path``."""

FEATURES = {"embedded": FASHION / "features", "faces": FACES / "judge"}
"""Embedded feature networks, by the name that a user gives."""
CLIPS = {"faces": FACES / "judge"}
"""Embedded CLIPs, likewise."""
READERS = {"faces": FACES / "reader"}
"""Embedded attribute readers, likewise."""
