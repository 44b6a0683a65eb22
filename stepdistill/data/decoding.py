"""Decoding an image file to 8-bit pixels of the teacher's shape.

These rules apply, in this order:

1. Only plain files of the formats in :data:`FORMATS` are opened. One of more than ``PIL.Image.MAX_IMAGE_PIXELS`` pixels
   is rejected by its header, before it is decoded.
2. The first frame is taken, turned upright by its EXIF orientation; damaged EXIF is ignored. Colour profiles are not
   applied.
3. 16-bit greys are scaled, ``round(v / 257)``, not clipped. 32-bit integers are read as 16-bit ones if they fit, and
   rejected if they do not; floating-point pixels have no defined range and are rejected.
4. Transparency (an alpha channel, a palette's or a ``tRNS`` colour) is composited on white.
5. Palettes, CMYK and the rest become RGB; RGB becomes grey by the ITU-R 601-2 luma if the teacher is grey.
6. The short side is resized to fit (bicubic, antialiased), up or down, and the centre is cropped; with ``fit: pad`` the
   long side is resized and the rest is white, with ``fit: stretch`` both sides are resized.

An array of the teacher's shape is taken as it is.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stepdistill.data.base import Fit
from stepdistill.data.remote import RemoteError
from stepdistill.data.tars import MAX_FILE_BYTES, TarMember

Source: TypeAlias = str | Mapping | TarMember | np.ndarray | None


FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that are read. It knows many more, whose decoders are seldom used and looked at."""


# What Pillow raises on damaged files, found by cutting short and altering files of every format.
_DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


_GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")


_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation, what makes an image upright; from 5 on, height and width are swapped."""


class UnreadableImageError(ValueError):
    """A file that is not an image, is damaged or too large, or whose pixels have no defined meaning."""


def read_pixels(source: Source, channels: int, size: Sequence[int], fit: Fit = "crop") -> np.ndarray:
    """Return the pixels (C, H, W) uint8 of an image, by the rules of this module; of a clip's array (C, F, H, W).

    Args:
        source: a path, a file in a tar, an undecoded ``datasets.Image`` value (``bytes`` or ``path``), or an array
            (H, W, C) uint8.
        channels: C, 1 or 3 unless the source is an array of that shape.
        size: (H, W), or (F, H, W) of a clip, which only an array may be.
        fit: how an image of other proportions is made to fit, see ``data.fit``.

    Raises:
        UnreadableImageError: saying why, but not which image.
    """
    if isinstance(source, np.ndarray) and source.shape == (*size, channels):
        return np.moveaxis(source, -1, 0)
    with _unreadable(), _open(source) as image:
        return fit_image(_opaque(_eight_bits(_upright(image))), channels, (size[0], size[1]), fit)


@functools.singledispatch
def read_shape(source: Source) -> tuple[int, int, int]:
    """Return (C, H, W) of an image from its header: 1 channel if it is grey, else 3; of an array, its own.

    Raises:
        UnreadableImageError: saying why, but not which image.
    """
    with _unreadable(), _open(source) as image:
        readable_exif = image.format != "PNG" or "exif" in image.info  # Pillow would decode a whole PNG to find it
        turned = readable_exif and _orientation(image) >= 5
        upright = image.size if turned else image.size[::-1]
        return 1 if image.mode in _GREY_MODES else 3, *upright


@read_shape.register
def _(source: np.ndarray) -> tuple[int, int, int]:
    height, width, channels = source.shape
    return channels, height, width


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    """Turn what Pillow raises on damaged files into ``UnreadableImageError``, and ignore what it warns of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow only raises at twice its limit
            yield
    except RemoteError:  # of the network, and not of this image
        raise
    except _DECODE_ERRORS as error:
        raise UnreadableImageError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


@functools.singledispatch
def _open(source: Source) -> Image.Image:
    """Return an image whose header has been read."""
    raise TypeError(f"{type(source).__name__} is not a source of images")


@_open.register
def _(source: None) -> Image.Image:
    raise ValueError("no image in this row")


@_open.register
def _(source: np.ndarray) -> Image.Image:
    return Image.fromarray(source.squeeze(2) if source.shape[2] == 1 else source)


@_open.register
def _(source: Mapping) -> Image.Image:
    return _open_path(source["path"]) if source["bytes"] is None else _open_bytes(source["bytes"])


@_open.register
def _(source: TarMember) -> Image.Image:
    return _open_bytes(source.read(MAX_FILE_BYTES))


@_open.register
def _(source: str) -> Image.Image:
    return _open_path(source)


def _open_path(path: str) -> Image.Image:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for whoever fills it
        raise ValueError("it is not a plain file")
    if status.st_size > MAX_FILE_BYTES:
        raise ValueError(f"expected at most {MAX_FILE_BYTES:,} bytes, got {status.st_size:,}")
    return Image.open(path, formats=FORMATS)


def _open_bytes(content: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:  # Pillow's names an address in memory: on every visit another problem
        raise UnidentifiedImageError("cannot identify image file") from None


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Return how an image is turned by its EXIF, 1 to 8; 1 if that is damaged, or Pillow turns the image itself."""
    if image.format == "TIFF":
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION)
        return orientation if orientation in _TURNS else 1
    except _DECODE_ERRORS:
        return 1


def fit_image(image: Image.Image, channels: int, size: tuple[int, int], fit: Fit) -> np.ndarray:
    """Return the pixels (C, H, W) of an image, made to fit as ``data.fit`` says."""
    height, width = size
    image = image.convert("RGB" if channels == 3 else "L")
    match fit:
        case "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        case "pad":
            white = "white" if channels == 3 else 255
            scale = min(width / image.width, height / image.height)
            if round(min(image.size) * scale) < 1:  # Pillow would return white alone
                raise ValueError(f"{image.width}x{image.height} pixels are too long and thin to pad")
            image = ImageOps.pad(image, (width, height), Image.Resampling.BICUBIC, color=white)
        case "stretch":
            image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values: expected 16 bits, got {values.min()} to {values.max()}")
    grey, clear = Image.fromarray(((values + 128) // 257).astype(np.uint8)), image.info.get("transparency")
    if clear is not None:  # a level of 16 bits, which others share in 8
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image if image.mode == "L" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
