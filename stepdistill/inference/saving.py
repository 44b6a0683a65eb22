"""Writing what ``stepdistill generate`` makes: a grid, or a folder of single files that record how they were made."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from stepdistill.data.text import json_lines
from stepdistill.files.writing import check_writable
from stepdistill.inference.clips import open_writer, write_clip
from stepdistill.inference.grids import save_grid, to_pil
from stepdistill.inference.sampling import Images
from stepdistill.randomness import derive_seed

FRAMES_ARGUMENTS = ("num_frames", "video_length")
"""Arguments of a call that makes clips, of which a pipeline knows one."""
TABLE = "metadata.jsonl"
OWN_NAME = re.compile(r"\d{6,}\.(png|mp4)")
"""Names of single files."""
OTHER_ENDINGS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mp4")
"""Of files that somebody may expect, and that are not written."""


def side_by_side(left: Images, right: Images) -> Images:
    """Return every image with the teacher's on its right; raise ``ValueError`` if they differ in size."""
    if right.pixels.shape != left.pixels.shape:
        sizes = " and ".join(" x ".join(map(str, found.pixels.shape[2:])) for found in (left, right))
        raise ValueError(f"--compare: the pipeline and its teacher generate images of different sizes: {sizes}")
    return dataclasses.replace(left, pixels=torch.cat([left.pixels, right.pixels], dim=-1))


def is_grid(output: Path) -> bool:
    """Return whether a place is that of a grid."""
    return output.suffix.lower() == ".png"


def check_places(outputs: Sequence[Path]) -> None:
    """Raise ``ValueError`` if nothing can be written to one of the places, or something else would be replaced there.

    A folder may hold what ``generate`` wrote before. It is no place for single images if it has a table of others,
    which would lose their captions and labels, others with the same names, or only files that are none of ours: a
    table beside them would change which of them are data.
    """
    for output in outputs:
        check_writable(output)
        if output.suffix.lower() in OTHER_ENDINGS or (output.exists() and output.is_dir() == is_grid(output)):
            raise ValueError(f"--output: expected a .png for a grid, or a folder for single images, got {output}")
        if not is_grid(output):
            _check_earlier(output / TABLE, output / f"{0:06d}.png")
            _check_contents(output)


def _check_earlier(table: Path, first: Path) -> None:
    if table.is_file():
        for where, row in json_lines(table).items():
            if not OWN_NAME.fullmatch(str(row.get("file_name"))):
                raise ValueError(f"--output: {where}: is of images that were made elsewhere; choose another folder")
    if first.is_file():
        with Image.open(first) as image:
            if "generator_seed" not in image.info:
                raise ValueError(f"--output: {first}: is an image that was made elsewhere; choose another folder")


def _check_contents(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("[!.]*"))
    if names and not {TABLE, f"{0:06d}.png", f"{0:06d}.mp4"} & set(names):
        raise ValueError(f"--output: expected a new folder or one of an earlier call, got {folder} with {names[0]}")


def check_outputs(pipeline: Any, outputs: Sequence[Path]) -> None:
    """Raise ``ValueError`` if a pipeline makes clips, which are to be files, and nothing writes them."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if not accepted.keys().isdisjoint(FRAMES_ARGUMENTS) and not all(map(is_grid, outputs)):
        open_writer()


def save_images(images: Images, output: Path, *, seed: int, about: Mapping[str, str]) -> None:
    """Write a grid (a ``.png``) or a folder of single images, which record how they were made as PNG text."""
    if is_grid(output):
        save_grid(images.pixels / 255, output)
        return
    output.mkdir(parents=True, exist_ok=True)
    (output / TABLE).unlink(missing_ok=True)  # an earlier one would tell the wrong prompts if this call is interrupted
    rows: list[dict[str, Any]] = []
    for index, pixels in enumerate(images.pixels):
        facts = {**about, "seed": seed, "index": index, "generator_seed": derive_seed(seed, index)}
        name = f"{index:06d}.png" if pixels.ndim == 3 else f"{index:06d}.mp4"
        rows.append({"file_name": name})
        if images.captions is not None:
            facts["prompt"] = rows[-1]["text"] = images.captions[index]
        if images.labels is not None:
            facts["class_label"] = rows[-1]["label"] = int(images.labels[index])
        save_sample(pixels, output / name, facts)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (output / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_sample(pixels: Tensor, file: Path, facts: Mapping[str, Any]) -> None:
    """Write an image (C, H, W) with its facts, or a clip (C, F, H, W)."""
    if pixels.ndim == 4:
        write_clip(pixels, file)
    else:
        to_pil(pixels).save(file, pnginfo=png_text(facts))


def png_text(facts: Mapping[str, Any]) -> PngInfo:
    """Return facts as international text chunks of a PNG."""
    info = PngInfo()
    for key, value in facts.items():
        info.add_itxt(key, str(value))
    return info
