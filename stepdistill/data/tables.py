"""The columns of a Hugging Face dataset, or of a parquet file as pandas and polars write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepdistill.data.columns import Column, Texts, read_texts


class ImageCells(Sequence):
    """A column of encoded images as ``{"bytes": ..., "path": ...}``, read cell by cell; None if there is no image."""

    def __init__(self, cells: Sequence[Any], read: Callable[[Any], dict[str, Any]]) -> None:
        self._cells, self._read = cells, read

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, row: Any) -> Any:
        cell = self._cells[row]
        return None if cell is None else self._read(cell)


def _of_bytes(cell: bytes) -> dict[str, Any]:
    return {"bytes": cell, "path": None}


def _of_struct(cell: dict[str, Any]) -> dict[str, Any]:
    return {"bytes": cell.get("bytes"), "path": cell.get("path")}


def cell_reader(kind: Any) -> Callable[[Any], dict[str, Any]] | None:
    """Return what reads a cell of an arrow type as ``{"bytes": ..., "path": ...}``; None if it holds no images."""
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    if holds_bytes(kind):
        return _of_bytes
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type):
        return _of_struct
    return None


def image_cells(table: Any, name: str, where: str) -> Sequence[Any]:
    """Return the column of images, not decoded.

    Args:
        table: a ``datasets.Dataset``.
        name: of a column of ``datasets.Image``, of bytes, or of structs with ``bytes`` and perhaps ``path``.
        where: the table's path, for the error.

    Raises:
        ValueError: if the column is of another type.
    """
    import datasets

    if isinstance(table.features[name], datasets.Image):
        return table.cast_column(name, datasets.Image(decode=False))[name]
    read = cell_reader(table.data.schema.field(name).type)
    if read is not None:
        return ImageCells(table[name], read)
    expected = "a datasets.Image, bytes, or structs of bytes and path"
    raise ValueError(f"{where}: column {name!r}: expected {expected}, got {table.features[name]}")


def label_cells(table: Any, name: str | None, where: str) -> tuple[np.ndarray | None, str | None]:
    """Return the column of labels, (N,) int; or None and why it cannot be used."""
    from pyarrow import types

    if name is None:
        return None, None
    if types.is_integer(table.data.schema.field(name).type):
        labels = np.asarray(table.with_format("numpy")[name][:])
        if labels.dtype.kind in "iu" and labels.ndim == 1:
            return labels, None
    return None, f"{where}: column {name!r}: expected whole numbers, none missing, got {table.features[name]}"


def caption_cells(table: Any, name: str | None, where: str) -> Column[Texts]:
    """Return the column of captions: texts, or lists of texts."""
    column = Column[Texts]()
    try:
        cells = table[name][:] if name else ()
    except ValueError as error:  # text that is not UTF-8
        column.fail(f"{where}: column {name!r}: {error}")
        return column
    for row, value in enumerate(cells):
        column.add(read_texts, value, f"{where}[{row}]: {name!r}")
    return column
