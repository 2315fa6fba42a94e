"""Rows of Parquet files."""

from __future__ import annotations

from typing import Any

from gspo.data.readers.rows import existing_path, readable, require_rows
from gspo.errors import DataError


class ParquetRows:
    """A Parquet file, or a directory of them, held in memory as an Arrow table."""

    def __init__(self, source: str) -> None:
        import pyarrow
        import pyarrow.parquet

        path = existing_path(source)
        try:
            self._table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(source, must=f"not readable as Parquet: {error}") from error
        self._stem = path.name
        require_rows(self, source)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        with readable(self, index):
            return self._table.slice(index, 1).to_pylist()[0]

    def name(self, index: int) -> str:
        """Return the source and the row, from 0."""
        return f"{self._stem}:{index}"
