"""The files in an uncompressed tar, and where they lie in it: on this machine, or at an address.

Only headers are read, from front to back; a file is read at its offset when it is needed, so samples can be read in any
order. Of a tar at an address the files and the texts among them are noted on this machine, in an *index*, by the first
process that opens it: others, and a run that is resumed, read the index and no header again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import struct
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stepdistill.data.remote import (
    RemoteError,
    in_parallel,
    is_address,
    no_ranges,
    noted_at,
    open_system,
    persistently,
    read_range,
    read_ranges,
    shown,
)
from stepdistill.data.text import json_lines
from stepdistill.files.locks import locked
from stepdistill.files.reading import check_file
from stepdistill.files.writing import atomic_write

TEXTS = (".txt", ".cls", ".json")
"""Endings of the files of a sample that are text; an index keeps their content."""
MAX_TEXT_BYTES = 2**20
"""Size of the largest caption or label."""
MAX_FILE_BYTES = 2**30
"""Size of the largest image or video."""
MAX_HEADER_BYTES = 2**20
"""Most that the header of one member, with its long name and extensions, may take."""
MAX_TAR_BYTES = 2**50
BLOCK = 2**20
"""Bytes of a tar at an address that are read at a time for its headers; what is between two of a larger file is not."""

_TAR_ERRORS = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    struct.error,
)
"""What tarfile raises for damaged archives (``RecursionError`` is a ``RuntimeError``)."""


@dataclasses.dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar: its offset, its length in bytes, and its content where that is known."""

    tar: str
    name: str
    offset: int
    size: int
    content: bytes | None = None

    def __str__(self) -> str:
        return f"{_name(self.tar)}!{self.name}"

    def read(self, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
        """Return the content; raise ``OSError`` if the tar ends too early, ``ValueError`` if there is too much."""
        if self.size > max_bytes:
            raise ValueError(f"{self}: expected at most {max_bytes:,} bytes, got {self.size:,}")
        if self.content is not None:
            return self.content
        content = self._read()
        if len(content) != self.size:
            raise OSError(f"{self}: the tar is cut short")
        return content

    def _read(self) -> bytes:
        if is_address(self.tar):
            return read_range(self.tar, self.offset, self.size)
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def _name(tar: str) -> str:
    return shown(tar) if is_address(tar) else tar


def fetch(members: Sequence[TarMember], max_bytes: int) -> list[TarMember]:
    """Return files of tars at addresses with their contents, which are asked for together; too large ones as they are.

    Raises:
        RemoteError: naming the address that cannot be read.
    """
    wanted = [place for place, member in enumerate(members) if member.content is None and member.size <= max_bytes]
    found = list(members)
    contents = read_ranges([(members[place].tar, members[place].offset, members[place].size) for place in wanted])
    for place, content in zip(wanted, contents, strict=True):
        if len(content) == members[place].size:
            found[place] = dataclasses.replace(members[place], content=content)
    return found


def members_of(tars: Sequence[str]) -> Iterator[list[TarMember]]:
    """Yield the files of every tar, in their order.

    Raises:
        ValueError: for one that is not an uncompressed tar, and for names that lead out of it.
    """
    if tars and is_address(tars[0]):
        yield from in_parallel(_indexed, tars)
        return
    for tar in tars:
        check_file(Path(tar), MAX_TAR_BYTES)
        with io.FileIO(tar) as file:
            yield list(_members(tar, file))


def _members(tar: str, file: Any) -> Iterator[TarMember]:
    """Yield the files in a tar; warn once of links, devices and sparse files, whose content is not there."""
    others, last = [], -1
    for entry in _entries(tar, file):
        member = TarMember(tar, entry.name, entry.offset_data, entry.size)
        if entry.name.startswith("/") or ".." in entry.name.split("/"):
            raise ValueError(f"{member}: expected a name inside the tar, got one that leads outside")
        if entry.size < 0 or entry.offset <= last:  # a negative size leads back to an earlier header, for ever
            raise ValueError(f"{member}: expected a size of at least 0, got a negative one")
        last = entry.offset
        if entry.isreg() and not entry.sparse:
            yield member
        elif not entry.isdir():
            others.append(str(member))
    if others:
        first = f"the first is {others[0]}"
        warnings.warn(f"{_name(tar)}: left out {len(others)} links, devices or sparse files; {first}", stacklevel=2)


def _entries(tar: str, file: Any) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:
            yield from archive
    except RemoteError:
        raise
    except _TAR_ERRORS as error:
        raise ValueError(
            f"{_name(tar)}: cannot be read as an uncompressed tar ({error}); unpack .tar.gz first"
        ) from error


class _Headers(io.RawIOBase):
    """A tar of which only headers are read, so that one that declares gigabytes takes none."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise OSError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


# ------------------------------------------------------------------------------------------------- at an address


@dataclasses.dataclass(frozen=True)
class _Line:
    """A file of a tar in its index; text as Latin-1, which keeps all bytes."""

    name: str
    offset: int
    size: int
    text: str | None


def _indexed(tar: str) -> list[TarMember]:
    """Return the files of a tar at an address, from its index, which is made by one process if it is not there."""
    index = noted_at(tar, "tars").with_suffix(".jsonl")
    with locked(index.with_suffix(".lock")):
        if not index.is_file():
            _write_index(tar, index)
    members = []
    for line in json_lines(index, _Line).values():
        content = None if line.text is None else line.text.encode("latin-1")
        members.append(TarMember(tar, line.name, line.offset, line.size, content))
    return members


def _write_index(tar: str, index: Path) -> None:
    system, path = open_system(tar)
    options: dict[str, Any] = {"block_size": BLOCK, "cache_type": "readahead"}
    with (
        contextlib.closing(persistently(tar, functools.partial(system.open, path, "rb", **options))) as opened,
        atomic_write(index) as partial,
        partial.open("w", encoding="ascii") as lines,
    ):
        file = _Persistent(tar, opened)
        for member in _members(tar, file):
            line = _Line(member.name, member.offset, member.size, _text(member, file))
            lines.write(json.dumps(dataclasses.asdict(line)) + "\n")


def _text(member: TarMember, file: Any) -> str | None:
    """Return the content of a small text; None of another file, and where the tar is cut short."""
    if not member.name.lower().endswith(TEXTS) or member.size > MAX_TEXT_BYTES:
        return None
    file.seek(member.offset)
    content = file.read(member.size)
    return content.decode("latin-1") if len(content) == member.size else None


class _Persistent:
    """A file at an address, whose reads are tried again."""

    def __init__(self, address: str, file: Any) -> None:
        self._address, self._file = address, file

    def read(self, size: int) -> bytes:
        place = self._file.tell()

        def again() -> bytes:
            self._file.seek(place)
            return self._file.read(size)

        try:
            return persistently(self._address, again)
        except RemoteError as error:
            if isinstance(error.__cause__, ValueError):  # of fsspec, for a server that knows no ranges
                raise RemoteError(no_ranges(self._address)) from error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
