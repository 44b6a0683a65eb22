"""Files at an address, ``https://``, ``s3://``, ``hf://`` or any other that fsspec knows, of which ranges are read.

Nothing is downloaded whole unless the user asks for it (``data.download``). A read that fails is tried again for some
15 seconds. What fails for good is a :class:`RemoteError` of one sentence, and never a sample to skip: a run that is
resumed would then see other samples.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from stepdistill.config import fingerprint_json
from stepdistill.files.locks import locked
from stepdistill.files.writing import atomic_write

T = TypeVar("T")
Item = TypeVar("Item")

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between two tries."""
SILENCE = 60.0
"""Seconds after which a server is taken to be gone."""
PARALLEL = 16
"""Files or ranges that are asked for at a time."""
MAX_FILES = 1_000_000
"""Most that one range ``{000..999}`` names."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_FINAL = (
    FileNotFoundError, IsADirectoryError, LookupError, NotADirectoryError, NotImplementedError, PermissionError,
    TypeError, ValueError,
)  # fmt: skip
"""What no second try mends."""
_TRANSIENT_STATUS = (408, 425, 429)
"""HTTP's codes of "later, please" among those of a wrong request."""
_CONTENT = (
    "ETag", "etag", "blob_id", "md5Hash", "checksum", "Content-MD5", "Last-Modified", "LastModified", "mtime",
    "created",
)  # fmt: skip
"""Entries of fsspec's description of a file that tell whether its content is another."""


class RemoteError(ValueError):
    """A file at an address cannot be read."""


def is_address(path: str) -> bool:
    """Whether a path is an address of fsspec, and not one of this machine's files."""
    return _ADDRESS.match(path) is not None


def shown(address: str) -> str:
    """Return an address without what a signed one keeps secret.

    >>> shown("https://me:key@host/a.tar?signature=1")
    'https://host/a.tar'
    """
    return re.sub(r"://[^/@]*@", "://", address).partition("?")[0]


def ending(address: str) -> str:
    """Return the end of an address's file name, such as ``.tar``."""
    return shown(address).rpartition("/")[2].lower()


def open_system(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it.

    Raises:
        RemoteError: if fsspec has none, or a package for it is missing.
    """
    return _open_system(os.getpid(), address)


@functools.lru_cache(maxsize=MAX_FILES)
def _open_system(process: int, address: str) -> tuple[Any, str]:
    """Open a file system once in every process; fsspec would do so in every thread, with connections of its own."""
    del process
    try:
        return fsspec.core.url_to_fs(address, **_options(address))
    except ImportError as error:
        raise RemoteError(
            f"{shown(address)}: {error}; pip install 'stepdistill[streaming]' brings https:// and s3://"
        ) from error
    except ValueError as error:
        raise RemoteError(f"{shown(address)}: {error}") from error


def _options(address: str) -> dict[str, Any]:
    """Return options of a file system: over HTTP a silent server is given up soon, and a long file is not."""
    if not address.startswith(("http://", "https://")):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}}


def persistently(address: str, read: Callable[[], T]) -> T:
    """Return ``read()``, tried again while it fails for a reason that may pass.

    Raises:
        RemoteError: naming the address, and why it cannot be read.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except RemoteError:
            raise
        except Exception as error:  # every file system raises its own library's
            reason = _reason(error)
            if pause is None or _is_final(reason):
                raise RemoteError(f"{shown(address)}: {_sentence(reason)}") from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _reason(error: BaseException) -> BaseException:
    """Return what went wrong; over HTTP fsspec says that there is no such file, whatever it was."""
    cause = error.__cause__
    if type(error) is not FileNotFoundError or cause is None:
        return error
    is_of_network = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return cause if is_of_network else error


def _status(error: BaseException) -> int:
    """Return HTTP's code of an error of aiohttp or of the hub; 0 if it has none."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", 0)
    return status if type(status) is int else 0


def _is_final(error: BaseException) -> bool:
    return isinstance(error, _FINAL) or (400 <= _status(error) < 500 and _status(error) not in _TRANSIENT_STATUS)


def _sentence(error: BaseException) -> str:
    text = shown(" ".join(str(error).split())) or type(error).__name__
    if type(error) is FileNotFoundError or _status(error) in (404, 410):
        return "no such file"
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return f"no permission to read it: {text}"
    return f"cannot be read: {text}" if _is_final(error) else f"cannot be read, {len(PAUSES) + 1} tries failed: {text}"


def in_parallel(work: Callable[[Item], T], items: Iterable[Item], threads: int = PARALLEL) -> list[T]:
    """Return the work's results in the order of the items."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def content_key(address: str) -> list[Any]:
    """Return what tells a file's content from another at its address: size, and the server's tag or time, if known."""
    system, path = open_system(address)
    info = persistently(address, functools.partial(system.info, path))
    if info.get("type", "file") != "file":
        raise RemoteError(f"{shown(address)}: expected a file, got a {info['type']}")
    return [info.get("size"), *(str(info[key]) for key in _CONTENT if info.get(key))]


def version_of(addresses: Sequence[str]) -> str:
    """Return a hash of the names and contents of files."""
    names = []
    for address in addresses:
        open_system(address)  # here, so that all share what this thread has
        names.append(shown(address))
    return fingerprint_json([names, in_parallel(content_key, addresses)])


def read_ranges(places: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Return the content at every place (address, first byte, number of bytes); ranges are asked for together.

    Raises:
        RemoteError: naming the address that cannot be read.
    """
    if not places:
        return []
    system, _ = open_system(places[0][0])
    if not system.async_impl:
        return in_parallel(lambda place: read_range(*place), places)
    paths = [open_system(address)[1] for address, _, _ in places]
    starts = [start for _, start, _ in places]
    ends = [start + size for _, start, size in places]
    found = system.cat_ranges(paths, starts, ends, on_error="return")
    contents = []
    for place, content in zip(places, found, strict=True):
        contents.append(content if type(content) is bytes and len(content) == place[2] else read_range(*place))
    return contents


def read_range(address: str, start: int, size: int) -> bytes:
    """Return ``size`` bytes of a file from ``start`` on, fewer where it ends.

    Raises:
        RemoteError: if it cannot be read, or only as a whole.
    """
    system, path = open_system(address)
    content = persistently(address, lambda: system.cat_file(path, start=start, end=start + size))
    if len(content) > size:
        raise RemoteError(no_ranges(address))
    return content


def no_ranges(address: str) -> str:
    """Return what to do about a server that sends whole files only."""
    return (
        f"{shown(address)}: the server sends whole files only, and no ranges; data.download=true keeps a copy of every "
        "file"
    )


def cache_folder() -> Path:
    """Return where copies and indices are kept: ``$XDG_CACHE_HOME/stepdistill``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "stepdistill"


def noted_at(address: str, folder: str) -> Path:
    """Return where what this machine keeps of a file lies; elsewhere once its content is another."""
    key = json.dumps([address, content_key(address)])
    return cache_folder() / folder / hashlib.sha256(key.encode()).hexdigest()[:32]


def downloaded(address: str) -> str:
    """Return the path of a copy of a file on this machine, which one process makes if it is not there.

    Raises:
        RemoteError: if it cannot be read.
    """
    system, path = open_system(address)
    copy = noted_at(address, "files") / ending(address)
    with locked(copy.with_suffix(".lock")):
        if not copy.is_file():
            with atomic_write(copy) as partial:
                persistently(address, lambda: system.get_file(path, str(partial)))
    return str(copy)


# ------------------------------------------------------------------------------------------------- which files


def addresses_of(address: str, suffix: str) -> list[str]:
    """Return the addresses of files, sorted: that of one file, of a range ``{000..127}``, of a pattern, or of a folder.

    Hidden files of a pattern or a folder are left out.

    Args:
        address: a file's if it ends in ``suffix``; one with ``*`` is a pattern; else a folder, of which files right in
            it are taken.
        suffix: of the files.

    Raises:
        RemoteError: if they cannot be listed, or the pattern has ``**``, of which one folder would be read.
    """
    if "**" in address:
        raise RemoteError(f"{shown(address)}: expected '*' for names in one folder, got '**'")
    if found := _RANGE.search(address):
        numbers = range(int(found[1]), int(found[2]) + 1)
        if len(numbers) > MAX_FILES:
            raise RemoteError(f"{shown(address)}: expected at most {MAX_FILES:,} files, got {len(numbers):,}")
        head, tail = address[: found.start()], address[found.end() :]
        if not ending(address).endswith(suffix):
            return []
        return [f"{head}{number:0{len(found[1])}d}{tail}" for number in numbers]
    if "*" not in address and ending(address).endswith(suffix):
        return [address]
    system, path = open_system(address)
    pattern = path if "*" in address else f"{path.rstrip('/')}/*{suffix}"
    rows = persistently(address, functools.partial(_matching, system, pattern))
    names = [row["name"] for row in rows if row["name"].endswith(suffix)]
    return sorted(system.unstrip_protocol(name) for name in names if not name.rpartition("/")[2].startswith("."))


def _matching(system: Any, pattern: str) -> list[dict[str, Any]]:
    """Return fsspec's descriptions of what matches a pattern with ``*``.

    fsspec's own ``glob`` passes over a folder that cannot be listed, and some of the files would be missing.
    """
    folder, _, name = pattern.rpartition("/")
    folders = [folder]
    if "*" in folder:
        folders = [row["name"].rstrip("/") for row in _matching(system, folder) if row["type"] == "directory"]
    rows = [row for place in folders for row in _rows_in(system, place)]
    return [row for row in rows if fnmatch.fnmatchcase(row["name"].rstrip("/").rpartition("/")[2], name)]


def _rows_in(system: Any, folder: str) -> list[dict[str, Any]]:
    """Return fsspec's descriptions of what lies right in a folder; none if it does not exist."""
    try:
        return system.ls(folder, detail=True)
    except FileNotFoundError as error:
        if _reason(error) is not error:
            raise
        return []
