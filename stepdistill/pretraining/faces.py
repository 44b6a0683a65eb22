"""Captions of pixel-art faces, each of which names a random few of a face's attributes.

A caption that named all of them would leave nothing to sample: one step would draw nearly the final picture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Container
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from stepdistill.files.reading import parse_json, read_text

Face: TypeAlias = dict[str, str]
"""A face's attributes, in words."""

NAMES = ("skin", "hair_length", "hair_colour", "shirt", "mouth", "glasses", "hat", "beard", "earrings")
NUMBER_NAMED = (0.05, 0.25, 0.3, 0.2, 0.12, 0.08)
"""Chances that a caption names 0, 1, 2, ... attributes."""

ALIKE = {
    "hair_colour": {"auburn": "brown", "reddish brown": "brown", "chestnut": "brown"},
    "glasses": {"black": "dark"},
}
"""Words for colours that differ by a few levels, and the value that stands for both."""

CONTRAST = 45
"""Levels, summed over the three channels, by which a beard or an earring is seen."""
HAIR_PIXELS = 3
"""Number of pixels by which the colour of hair is seen."""
SHIRT_TOP = 13
"""The first row of pixels in which a shirt is drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the file of faces."""

    skin: str
    hair: str
    clothing: str
    mouth: str
    glasses: str = "none"
    hat: str = "none"
    beard: str = "none"
    earrings: str = "none"

    def face(self) -> Face:
        """Return the attributes, in words without their nouns."""
        length, _, colour = self.hair.removesuffix(" hair").partition(" ")
        return {
            "skin": self.skin,
            "hair_length": length,
            "hair_colour": colour,
            "shirt": self.clothing.removesuffix(" shirt"),
            "mouth": self.mouth,
            "glasses": self.glasses.removesuffix(" glasses"),
            "hat": self.hat.removesuffix(" hat"),
            "beard": self.beard,
            "earrings": self.earrings,
        }


def read_faces(path: Path) -> list[Face]:
    """Return the faces of a ``.jsonl``; raise ``ValueError`` with the line of one that is no :class:`Row`."""
    lines = enumerate(read_text(path).splitlines(), 1)
    return [parse_json(line, f"{path}:{number}", Row).face() for number, line in lines]


def visible(faces: list[Face], images: np.ndarray) -> list[Face]:
    """Return the faces without what nobody sees in ``images`` (N, H, W, 3) uint8.

    Hair under a hat has the colour ``hidden``. Beards are drawn faintly, and earrings under hair: those that no pixel
    shows by :data:`CONTRAST` are ``none``.
    """
    codes = images.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    found = [dict(face) for face in faces]
    for word in sorted({face["hair_colour"] for face in faces}):
        has = np.array([face["hair_colour"] == word for face in faces])
        shown = (codes == _own_colour(codes, has)).sum((1, 2)) >= HAIR_PIXELS
        for index in np.flatnonzero(has & ~shown):
            found[index]["hair_colour"] = "hidden"
    skins = np.array([face["skin"] for face in faces])
    for name in ("beard", "earrings"):
        has = np.array([face[name] != "none" for face in faces])
        for index in np.flatnonzero(has & (contrasts(images, codes, has, skins) < CONTRAST)):
            found[index][name] = "none"
    return found


def _own_colour(codes: np.ndarray, has: np.ndarray) -> int:
    """Return the most frequent colour of ``codes`` (N, H, W) that only images in ``has`` (N,) show."""
    own = np.setdiff1d(codes[has], codes[~has])
    colours, counts = np.unique(codes[has], return_counts=True)
    return int(colours[np.where(np.isin(colours, own), counts, 0).argmax()])


def contrasts(images: np.ndarray, codes: np.ndarray, has: np.ndarray, skins: np.ndarray) -> np.ndarray:
    """Return how much a thing differs from a face without it, (N,): levels, summed over the channels, at its clearest.

    A pixel counts if its colour is seen with the thing only. It is compared with the colours that are usual at its
    place on the same skin.

    Args:
        images: (N, H, W, 3) uint8.
        codes: (N, H, W) int, a number for each colour.
        has: (N,) bool, faces with the thing.
        skins: (N,) str.
    """
    clearest = np.zeros(len(images))
    own = np.isin(codes, np.setdiff1d(codes[has], codes[~has]))
    for skin, y, x in itertools.product(np.unique(skins), *map(range, codes.shape[1:])):
        rows = np.flatnonzero((skins == skin) & own[:, y, x])
        if not len(rows):
            continue
        usual = _usual(images[(skins == skin) & ~has, y, x])
        distance = np.abs(images[rows, y, x].astype(int)[:, None] - usual).sum(2).min(1)
        clearest[rows] = np.maximum(clearest[rows], distance)
    return clearest


def _usual(colours: np.ndarray) -> np.ndarray:
    """Return those of ``colours`` (N, 3) that one row in a hundred has."""
    found, counts = np.unique(colours, axis=0, return_counts=True)
    return found[counts > len(colours) / 100].astype(int)


def with_other_shirts(images: Tensor, attributes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, C, 16, 16) and attributes (N, :data:`NAMES`) twice, the second time with shirts exchanged.

    Then a network does not learn from faces which colours of hair and shirt go together.
    """
    other = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    dressed, values, shirt = images.clone(), attributes.clone(), NAMES.index("shirt")
    dressed[:, :, SHIRT_TOP:] = images[other][:, :, SHIRT_TOP:]
    values[:, shirt] = attributes[other, shirt]
    return torch.cat([images, dressed]), torch.cat([attributes, values])


def values_of(face: Face) -> Face:
    """Return what can be told from the picture: one value for colours that look the same."""
    return {name: ALIKE.get(name, {}).get(word, word) for name, word in face.items()}


def is_held_out(face: Face) -> bool:
    """Return whether training leaves this face out: one in ten pairs of hair and shirt colour, by the pair's hash."""
    pair = f"{face['hair_colour']}/{face['shirt']}"
    return int(hashlib.sha256(pair.encode()).hexdigest(), 16) % 10 == 0


def caption(face: Face, rng: np.random.Generator, always: tuple[str, ...] = ()) -> str:
    """Return a caption that names up to five attributes, drawn by ``rng``; those in ``always`` are added to them."""
    count = rng.choice(len(NUMBER_NAMED), p=NUMBER_NAMED)
    present = [name for name in NAMES if face[name] not in ("none", "hidden")]
    named = rng.choice(present, size=min(count, len(present)), replace=False)
    words = phrases(face, {*named.tolist(), *always})
    rng.shuffle(words)
    return "a face" if not words else f"a face with {_listed(words)}"


def phrases(face: Face, named: Container[str]) -> list[str]:
    """Return the phrases for the attributes ``named``."""
    hair = [face[name] for name in ("hair_length", "hair_colour") if name in named]
    article = "an" if face["shirt"][0] in "aeiou" else "a"
    glasses = face["glasses"] if face["glasses"] == "sunglasses" else f"{face['glasses']} glasses"
    told = {
        "skin": f"{face['skin']} skin",
        "shirt": f"{article} {face['shirt']} shirt",
        "mouth": {"smiling": "a smile", "frowning": "a frown"}[face["mouth"]],
        "glasses": glasses,
        "hat": f"a {face['hat']} hat",
        "beard": "a beard",
        "earrings": "earrings",
    }
    found = [phrase for name, phrase in told.items() if name in named]
    if hair:
        found.insert(1 if "skin" in named else 0, f"{' '.join(hair)} hair")
    return found


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
