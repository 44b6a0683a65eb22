"""The image files of a folder: through links, but never in circles, and with a count of what is left out."""

from __future__ import annotations

import collections
import dataclasses
import os
import warnings
from pathlib import Path

IMAGE_SUFFIXES = (
    ".apng", ".avif", ".avifs", ".bmp", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf",
    ".jpg", ".jpx", ".mpo", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Endings of the files that :mod:`stepdistill.data.decoding` reads."""

_COMPANIONS = (
    "", ".arrow", ".caption", ".cls", ".csv", ".db", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".npy", ".npz",
    ".parquet", ".py", ".tags", ".tar", ".tsv", ".txt", ".yaml", ".yml", ".zip",
)  # fmt: skip
"""Endings of files that nobody takes for images."""


def is_image(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """Whether a file is listed as an image, by its name."""
    return name.lower().endswith(suffixes) and not name.startswith(".")


def left_out_suffix(name: str) -> str:
    """Return the ending of a file that is no image, nothing that lies beside images by custom and not hidden; or ""."""
    suffix = os.path.splitext(name)[1].lower()
    is_known = suffix in _COMPANIONS or suffix in IMAGE_SUFFIXES
    return "" if is_known or name.startswith(".") or len(suffix) > 12 else suffix


def count_words(suffixes: collections.Counter[str]) -> str:
    """Return how many files there are of which endings, most frequent first."""
    return ", ".join(f"{number} {suffix}" for suffix, number in suffixes.most_common(20))


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files in a folder that fit a pattern, sorted, without hidden ones (``._a.tar``, which macOS adds)."""
    found = []
    for path in sorted(folder.glob(pattern)):
        if not path.is_dir() and not any(name.startswith(".") for name in path.relative_to(folder).parts):
            found.append(path)
    return found


@dataclasses.dataclass
class Found:
    """What a folder holds.

    Attributes:
        suffixes: endings of what is looked for.
        images: paths of the images, sorted.
        left_out: number of other files by ending, without those that lie beside images by custom.
        skipped: folders that were not entered, each with the reason.
    """

    suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    images: list[str] = dataclasses.field(default_factory=list)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    skipped: list[str] = dataclasses.field(default_factory=list)

    def add(self, file: os.DirEntry[str]) -> None:
        """Add a file to the images, or count it."""
        if is_image(file.name, self.suffixes):
            self.images.append(file.path)
        elif suffix := left_out_suffix(file.name):
            self.left_out[suffix] += 1

    def warn(self, folder: Path) -> None:
        """Say once what is left out; without any image it is an error, which says it."""
        if self.left_out and self.images:
            warnings.warn(
                f"{folder}: left out, because no such files are read: {count_words(self.left_out)}", stacklevel=2
            )
        if self.skipped:
            warnings.warn(
                f"{folder}: {len(self.skipped)} folders are not entered; the first is {self.skipped[0]}", stacklevel=2
            )


def find_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> Found:
    """Return the images in a folder and, also through links, in its sub-folders, without hidden ones.

    A link is not followed if it leads to a folder around it, by its place or by its target. Inside a linked folder no
    folder is entered by two links.
    """
    found = Found(suffixes)
    waiting = [(str(folder), {os.path.realpath(folder)}, False)]
    while waiting:
        place, entered, is_linked = waiting.pop()
        for entry in reversed(_entries(place, found)):
            if not entry.is_dir():
                found.add(entry)
            elif not entry.name.startswith("."):
                real = os.path.realpath(entry.path)
                if entry.is_symlink() and (real in entered or _holds(real, place)):
                    found.skipped.append(f"{entry.path} (a link that leads back to {real})")
                    continue
                inside = entered if is_linked else set(entered)
                inside.add(real)
                waiting.append((entry.path, inside, is_linked or entry.is_symlink()))
    found.images.sort()
    return found


def _entries(place: str, found: Found) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        found.skipped.append(f"{place} ({error.strerror})")
        return []


def _holds(real: str, place: str) -> bool:
    """Whether the folder of a real path is another one, or lies around it."""
    return os.path.commonpath((real, os.path.realpath(place))) == real
