"""Rows of JSON Lines files."""

from __future__ import annotations

import json
from array import array
from typing import Any

from gspo.data.readers.rows import existing_path, require_rows
from gspo.errors import DataError

_MAX_DEPTH = 100  # what copies, pickles or shows a row calls itself for each level


class JsonlRows:
    """One JSON object per line; blank lines are passed over.

    Opening reads the file once and parses every line, so that a bad one shows before the run and
    not during it; what stays in memory is 16 bytes per row.
    """

    def __init__(self, source: str) -> None:
        self._path = existing_path(source, takes_folder=False)
        self._offsets = array("q")
        self._lines = array("q")
        offset = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._parse(line, number)
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        require_rows(self, source)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._parse(file.readline(), self._lines[index])

    def name(self, index: int) -> str:
        """Return the file's name and the line."""
        return f"{self._path.name}:{self._lines[index]}"

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        place = f"{self._path}:{number}"
        shown = f"the line is {line[:80]!r}"
        try:
            row = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are two
            raise DataError(place, must=f"not JSON: {error}", remedy=shown) from error
        except RecursionError as error:
            raise _too_deep(place) from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DataError(place, must=f"a {kind}, not a JSON object", remedy=shown)
        may_be_deep = line.count(b"[") + line.count(b"{") > _MAX_DEPTH
        if may_be_deep and _is_deep(row):
            raise _too_deep(place)
        return row


def _too_deep(place: str) -> DataError:
    must = f"nested more than {_MAX_DEPTH} deep"
    return DataError(place, must=must, remedy="keep what is so deep as a text")


def _is_deep(row: dict[str, Any]) -> bool:
    level: list[Any] = [row]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list):
                below += value
        level = below
    return any(isinstance(value, dict | list) for value in level)
