"""What all rows of a result file share: the keys of its configuration, and the contents of the files that they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.benchmark.config import FREE_KEYS
from stepdistill.benchmark.results import Row, read_benchmark_result
from stepdistill.config import fingerprint_json, flatten
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.files.words import shown
from stepdistill.inference.sampling import Images

CONTENTS = "contents"
"""Section of a setting: fingerprints of what lies at paths of the configuration."""


def contents_of(suite: MetricSuite, captions: Sequence[str] | None, held_out: Images | None) -> dict[str, str | None]:
    """Return fingerprints of the captions, the held-out images and the networks beside the features.

    Those of the features and of the reference are in their own descriptions.
    """
    return {
        "captions": None if captions is None else fingerprint_json(list(captions)),
        "held_out": None if held_out is None else fingerprint_images(held_out),
        "clip": None if suite.clip is None else suite.clip.images.sha256,
        "attributes": None if suite.reader is suite.features else suite.reader.sha256,
    }


def fingerprint_images(images: Images) -> str:
    """Return twelve hex digits of images and their captions."""
    pixels = hashlib.sha256(images.pixels.contiguous().numpy().tobytes()).hexdigest()
    captions = None if images.captions is None else list(images.captions)
    return fingerprint_json([list(images.pixels.shape), pixels, captions])


def finished_rows(path: Path, setting: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a result file; none if there is no file.

    Raises:
        ValueError: if it holds rows of another setting. A file of an older version may lack keys that ask for nothing
            now, and all of the section ``contents``.
    """
    if not path.is_file():
        return []
    result = read_benchmark_result(path)
    before, now = flatten(result["setting"]), flatten(json.loads(json.dumps(setting)))
    for key, value in now.items():
        section = key.partition(".")[0]
        added = key not in before and (section == CONTENTS or value in (None, [], False))
        if section not in FREE_KEYS and not added and before.get(key) != value:
            raise ValueError(
                f"{path} was measured with another {key}: {shown(before.get(key))}, now {shown(value)}; "
                "move it away, choose another output, or restore the setting"
            )
    return list(result["rows"])
