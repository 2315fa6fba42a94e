"""What the commands of ``python -m gspo`` write alike: tables for people, and files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gspo.errors import InputError


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row of cells, in columns."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in table
    ]


def without_nan(value: Any) -> Any:
    """The same with null for a number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(to: str, text: str) -> None:
    """Writes what ``--json FILE`` asks for.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        Path(to).write_text(text + "\n")
    except OSError as error:
        raise InputError(
            f"--json: {to!r} cannot be written: {error.strerror}; choose another file"
        ) from error
