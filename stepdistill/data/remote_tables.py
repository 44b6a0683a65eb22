"""Parquet files at addresses: their labels and captions are read when they are opened, their images when needed.

A row's image is read with all images of its row group, which is the least that parquet gives. The newest row groups
stay in memory; a batch reads each of its own once.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from pyarrow import parquet

from stepdistill.data.hf_datasets import SPLIT
from stepdistill.data.remote import (
    RemoteError,
    addresses_of,
    downloaded,
    in_parallel,
    open_system,
    persistently,
    shown,
    version_of,
)
from stepdistill.data.tables import cell_reader
from stepdistill.files.words import nearest

SUFFIX = ".parquet"
GROUPS = 4
"""Row groups that stay in memory, and that are asked for at a time, of every process that reads."""


class RemoteTable:
    """Parquet files as one table.

    Args:
        address: of a file, a pattern or range of files, or a folder.
        split: of a folder of several splits; ``train`` by default.
        download: whether copies of the files are kept on this machine, and read.

    Raises:
        RemoteError: if there are no such files, they differ in their columns, or one cannot be read.
    """

    def __init__(self, address: str, split: str | None, *, download: bool = False) -> None:
        self.name = shown(address)
        files = _files_of(address, split)
        self.version = version_of(files)
        self._files = in_parallel(downloaded, files) if download else files
        self._footers = in_parallel(_footer, self._files)
        self._schema = self._footers[0].schema.to_arrow_schema()
        for file, footer in zip(self._files, self._footers, strict=True):
            if (names := footer.schema.to_arrow_schema().names) != self.column_names:
                raise RemoteError(f"{shown(file)}: expected the columns {self.column_names}, as in others, got {names}")
        self._groups = list(_row_groups(self._footers))
        counts = (self._footers[file].row_group(group).num_rows for file, group in self._groups)
        self._first_rows = list(itertools.accumulate(counts, initial=0))
        self._recent = functools.lru_cache(maxsize=GROUPS)(self._read_group)

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return self._schema.names

    def __len__(self) -> int:
        return self._first_rows[-1]

    def columns(self, names: Sequence[str]) -> Any:
        """Return some columns as a ``datasets.Dataset`` in memory."""
        read = functools.partial(_read_columns, names=list(names))
        return datasets.Dataset(pyarrow.concat_tables(in_parallel(read, zip(self._files, self._footers, strict=True))))

    def images(self, name: str) -> RemoteImages:
        """Return the column of encoded images; raise ``ValueError`` if it is of another type."""
        read = cell_reader(self._schema.field(name).type)
        if read is None:
            expected = "a datasets.Image, bytes, or structs of bytes and path"
            raise ValueError(f"{self.name}: column {name!r}: expected {expected}, got {self._schema.field(name).type}")
        return RemoteImages(self, name, read)

    def place(self, row: int) -> tuple[int, int]:
        """Return the row group of a row, and its place in it."""
        group = bisect.bisect_right(self._first_rows, row) - 1
        return group, row - self._first_rows[group]

    def group(self, number: int, name: str) -> Any:
        """Return a column of a row group."""
        return self._recent(number, name)

    def _read_group(self, number: int, name: str) -> Any:
        file, group = self._groups[number]
        address, footer = self._files[file], self._footers[file]
        return _read(address, footer, lambda table: table.read_row_group(group, columns=[name]))[name]


class RemoteImages(Sequence):
    """A column of encoded images, ``{"bytes": ..., "path": ...}`` or None, read by row groups."""

    def __init__(self, table: RemoteTable, name: str, read: Any) -> None:
        self._table, self._name, self._read = table, name, read

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: Any) -> Any:
        return self._cells([int(row)])[int(row)]

    def fetch(self, rows: Sequence[int]) -> Mapping[int, Any]:
        """Return the images of some rows; their row groups are asked for together."""
        by_group: dict[int, list[int]] = {}
        for row in rows:
            by_group.setdefault(self._table.place(row)[0], []).append(row)
        found: dict[int, Any] = {}
        for cells in in_parallel(self._cells, by_group.values(), GROUPS):
            found |= cells
        return found

    def _cells(self, rows: Sequence[int]) -> dict[int, Any]:
        """Return the images of rows of one row group."""
        column = self._table.group(self._table.place(rows[0])[0], self._name)
        found = {}
        for row in rows:
            cell = column[self._table.place(row)[1]].as_py()
            found[row] = None if cell is None else self._read(cell)
        return found


def _files_of(address: str, split: str | None) -> list[str]:
    """Return the files of a table; of a folder those of one split, as ``datasets`` tells splits by names."""
    if "*" in address or "{" in address or shown(address).endswith(SUFFIX):
        files = addresses_of(address, SUFFIX)
        if split is not None:
            raise RemoteError(f"data.split: got {split!r}, but {shown(address)} names the files itself")
    else:
        files = _split_files(address, split or SPLIT)
    if not files:
        raise RemoteError(
            f"{shown(address)}: no .tar and no {SUFFIX} files are listed there (data/{{000..127}}.tar names some)"
        )
    return files


def _split_files(address: str, split: str) -> list[str]:
    base = address.rstrip("/")
    open_system(base)  # whose errors tell more

    def look() -> Mapping[Any, Sequence[Any]]:
        try:
            return DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
        except EmptyDatasetError:
            return {}

    found = persistently(address, look)
    splits = {str(name): [str(file) for file in files if str(file).endswith(SUFFIX)] for name, files in found.items()}
    if any(splits.values()) and split not in splits:
        raise RemoteError(
            f"data.split: {shown(address)} has no {split!r}{nearest(split, splits)}; expected one of {sorted(splits)}"
        )
    return splits.get(split, [])


def _row_groups(footers: Sequence[Any]) -> Any:
    for file, footer in enumerate(footers):
        for group in range(footer.num_row_groups):
            yield file, group


def _footer(address: str) -> Any:
    return _read(address, None, lambda table: table.metadata)


def _read_columns(of: tuple[str, Any], names: list[str]) -> Any:
    return _read(*of, lambda table: table.read(columns=names))


def _read(address: str, footer: Any, read: Any) -> Any:
    """Return what ``read`` takes from a parquet file, whose footer may be known."""
    system, path = open_system(address)

    def again() -> Any:
        with (
            system.open(path, "rb", block_size=2**16, cache_type="none") as file,
            parquet.ParquetFile(file, metadata=footer, pre_buffer=True) as table,
        ):
            return read(table)

    return persistently(address, again)
