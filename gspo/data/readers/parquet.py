"""Rows of Parquet files."""

from __future__ import annotations

from typing import Any

from gspo.data.readers.rows import _existing, _require_rows
from gspo.errors import InputError


class ParquetRows:
    """A Parquet file, or a directory of them, held in memory as an Arrow table."""

    def __init__(self, source: str) -> None:
        import pyarrow
        import pyarrow.parquet

        path = _existing(source)
        try:
            self._table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{source}: not readable as Parquet: {error}") from error
        self._stem = path.name
        _require_rows(self, source)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._table.slice(index, 1).to_pylist()[0]

    def name(self, index: int) -> str:
        """The source and the row, from 0."""
        return f"{self._stem}:{index}"
