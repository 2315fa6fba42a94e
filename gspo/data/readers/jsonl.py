"""Rows of JSON Lines files."""

from __future__ import annotations

import json
from array import array
from typing import Any

from gspo.data.readers.rows import _existing, _require_rows
from gspo.errors import InputError


class JsonlRows:
    """One JSON object per line; blank lines are passed over.

    Opening reads the file once and parses every line, so that a bad one shows before the run and not during it; what
    stays in memory is 16 bytes per row.
    """

    def __init__(self, source: str) -> None:
        self._path = _existing(source)
        self._offsets, self._lines = array("q"), array("q")
        offset = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._parse(line, number)
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        _require_rows(self, source)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._parse(file.readline(), self._lines[index])

    def name(self, index: int) -> str:
        """The file's name and the line."""
        return f"{self._path.name}:{self._lines[index]}"

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are two
            raise InputError(
                f"{self._path}:{number}: not JSON: {error}; the line is {line[:80]!r}"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{self._path}:{number}: a {type(row).__name__}, not a JSON object: {line[:80]!r}"
            )
        return row
