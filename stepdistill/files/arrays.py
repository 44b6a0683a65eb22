"""Arrays that come from outside: no pickles, and no more memory than the file's own size can stand for.

What an ``.npz`` asks for is compared with what it is before any memory is taken: the sizes that the zip declares with
the size of the file, and the shape in the header of an array with the size of its member.
"""

from __future__ import annotations

import dataclasses
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from stepdistill.files.reading import check_file

MAX_RATIO = 200
"""Bytes of arrays to a byte of the file. Pictures reach 10 to 50; a bomb has about 1,000, the most that deflate can."""
FREE_BYTES = 256 * 2**20
"""Arrays together up to this size are read whatever the ratio."""
MAX_FILE_BYTES = 2**40
MAX_MEMBERS = 10_000

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_PROBLEMS = (
    OSError, EOFError, ValueError, OverflowError, NotImplementedError, RuntimeError, MemoryError, KeyError, IndexError,
    SyntaxError, TypeError, tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
"""What zipfile and numpy raise for damaged archives (``RecursionError`` is a ``RuntimeError``)."""


@dataclasses.dataclass(frozen=True)
class ArrayHeader:
    """Shape and type of an array that has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype


def array_headers(path: Path) -> dict[str, ArrayHeader]:
    """Return shape and type of every array of an ``.npz``, by name; none is read.

    Raises:
        ValueError: beginning with the path: if it is no such file, damaged, or asks for more memory than it may.
    """
    check_file(path, MAX_FILE_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _header(archive, member) for name, member in _members(archive, path).items()}
    except _PROBLEMS as error:
        raise ValueError(f"{path}: expected an .npz of plain arrays: {_words(error)}") from None


def read_arrays(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Return those arrays of an ``.npz`` that ``names`` lists and it holds.

    Raises:
        ValueError: as :func:`array_headers` does.
    """
    check_file(path, MAX_FILE_BYTES)
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name, member in _members(archive, path).items():
                if name in names:
                    arrays[name] = _array(archive, member)
    except _PROBLEMS as error:
        raise ValueError(f"{path}: expected an .npz of plain arrays: {_words(error)}") from None
    return arrays


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the members by the names of their arrays, if they are few, plain, and not larger than the file allows."""
    members = archive.infolist()
    named = {member.filename.removesuffix(".npy"): member for member in members}
    if len(named) < len(members) or len(members) > MAX_MEMBERS:
        raise ValueError(f"it has {len(members)} members of {len(named)} names")
    if strange := [name for name, member in named.items() if member.compress_type not in _COMPRESSIONS]:
        raise ValueError(f"{strange[0]!r} is neither stored nor deflated")
    size, allowed = sum(member.file_size for member in members), max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
    if size > allowed:
        raise ValueError(f"it would take {size:,} bytes of memory, and a file of its size at most {allowed:,}")
    return named


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> ArrayHeader:
    """Return the header of an array, whose size is that of its member."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"{member.filename!r} is of format {version}")
        shape, _, dtype = _HEADERS[version](file)
        found = member.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{member.filename!r} holds Python objects, which only a pickle could store")
    if (asked := math.prod(shape) * dtype.itemsize) != found:
        raise ValueError(f"{member.filename!r} asks for {asked:,} bytes and has {found:,}")
    return ArrayHeader(tuple(shape), dtype)


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    _header(archive, member)
    with archive.open(member) as file:
        array = npy.read_array(file, allow_pickle=False)
        file.read()  # to the end, where the checksum is compared
    return array


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
