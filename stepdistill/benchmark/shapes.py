"""A benchmark at other shapes: students where they were not trained, beside their teacher at the same shape.

Samples of another size than the reference's are resized (short side) and cropped at the centre before they are
measured, those of the teacher too. What lies outside the crop is not judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.families.base import Family


def at_shapes(config: BenchmarkConfig) -> list[BenchmarkConfig]:
    """Return the benchmark of the teacher and its students at every shape, each with a result file of its own."""
    output, benchmarks = Path(config.output), []
    for height, width in config.shapes:
        name = f"{output.stem}-{height}x{width}{output.suffix}"
        teacher = dataclasses.replace(config.teacher, resolution=(height, width))
        benchmarks.append(dataclasses.replace(
            config, teacher=teacher, output=str(output.with_name(name)), shapes=(), solvers={}, seeds={}, judge=None,
        ))  # fmt: skip
    return benchmarks


def check_shapes(config: BenchmarkConfig, family: Family) -> None:
    """Raise ``ValueError`` for a shape that the teacher does not sample."""
    if config.shapes and not family.takes_text:
        raise ValueError(f"shapes: expected none: {config.teacher.path} takes no text, and samples one size")
    for place, shape in enumerate(config.shapes):
        family.check_size((shape[0], shape[1]), f"shapes[{place}]")


def size_arguments(config: BenchmarkConfig, family: Family) -> dict[str, int]:
    """Return the arguments by which pipelines sample at ``teacher.resolution``; none if it is not set."""
    if config.teacher.resolution is None or not family.takes_text:
        return {}
    height, width = family.image_shape[-2:]
    return {"height": height, "width": width}


def side_to_crop_to(asked: Mapping[str, int], reference: Mapping[str, Any]) -> int | None:
    """Return the side of a reference's images, if samples of the ``asked`` size are to be cropped to it."""
    _, height, width = reference.get("shape", (0, 0, 0))
    return None if not asked or [*asked.values()] == [height, width] else width or None
