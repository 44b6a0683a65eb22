"""Image files of every format that is read, damaged by seed."""

from __future__ import annotations

import functools
import io
import random

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "PPM", "MPO")


@functools.cache
def whole(name: str) -> bytes:
    """A picture of 24x16 with EXIF, where the format has some, that says it lies on its side."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "a description", 0x011A: 72.5, 0x0128: 2})
    exif.get_ifd(0x8769).update({0x9286: b"ASCII\0\0\0hello", 0x829A: 0.01})
    exif.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, name, exif=exif)
    return buffer.getvalue()


def mutated(data: bytes, seed: int) -> bytes:
    """The file with some bytes changed, cut out, doubled or cut off; often near its beginning, where headers are."""
    random_ = random.Random(seed)
    content = bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 4, 16))):
        reach = len(content) if random_.random() < 0.4 else min(len(content), 400)
        place = random_.randrange(reach)
        match random_.randrange(8):
            case 0:
                del content[place : place + random_.randrange(1, 9)]
            case 1:
                content[place:place] = content[max(0, place - 8) : place]
            case 2 if random_.random() < 0.3:
                del content[place:]
            case 3:
                content[place : place + 4] = random_.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\0\x01"))
            case _:
                content[place] = random_.choice((0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)))
        if not content:
            break
    return bytes(content)


@functools.cache
def _exif() -> bytes:
    with Image.open(io.BytesIO(whole("JPEG"))) as image:
        return image.info["exif"]


def with_damaged_exif(name: str, seed: int) -> bytes:
    """A whole picture of one grey, whose EXIF block alone is damaged."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (90, 90, 90)).save(buffer, name, exif=b"Exif\0\0" + mutated(_exif()[6:], seed))
    return buffer.getvalue()
