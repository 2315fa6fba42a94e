"""What the commands of ``python -m gspo`` write alike: tables for people, and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gspo.errors import InputError


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row of cells, in columns."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in table]


def write_json(to: str, text: str) -> None:
    """Writes what ``--json FILE`` asks for.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        Path(to).write_text(text + "\n")
    except OSError as error:
        raise InputError(f"--json: {to!r} cannot be written: {error.strerror}; choose another file") from error
