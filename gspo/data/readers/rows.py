"""A source of prompts as a reader sees it: rows by index."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from gspo.errors import DataError, InputError, require

_CORRECT = "correct the row or take it out"


class Rows(Protocol):
    """A source of prompts: rows by index, and where each comes from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the row's fields by name, for template, answer and the prompt's metadata."""
        ...

    def name(self, index: int) -> str:
        """Return a stable id that leads back to the source, e.g. ``train.jsonl:17``."""
        ...


def existing_path(source: str, *, takes_folder: bool = True) -> Path:
    """Return the path of a file or folder that is there.

    Raises:
        InputError: It is not, or is a folder where none is taken.
    """
    is_text = isinstance(source, str) and source != ""
    require(is_text, "source", source, "must be a text", "name a file of prompts")
    path = Path(source).expanduser()
    looked_for = f"does not exist (looked for {path.absolute()})"
    require(path.exists(), "source", source, looked_for)
    is_taken = takes_folder or not path.is_dir()
    require(is_taken, "source", source, "is a folder", "name a file in it")
    return path


def require_rows(rows: Rows, source: str) -> None:
    """Refuse a source without rows.

    Raises:
        InputError: There are none.
    """
    require(len(rows) > 0, "source", source, "is empty", "a run needs at least one prompt")


@contextlib.contextmanager
def readable(rows: Rows, index: int) -> Iterator[None]:
    """Name the row whose values Arrow does not turn into Python's.

    Raises:
        DataError: Text is not UTF-8, or a date out of Python's range.
    """
    try:
        yield
    except (ArithmeticError, ValueError) as error:
        must = f"not readable: {error}"
        raise DataError(rows.name(index), must=must, remedy=_CORRECT) from error


def require_field(key: str, field: str, row: Mapping[str, Any], name: str) -> None:
    """Refuse a row without a field that a key of the config names.

    Raises:
        InputError: It has none.
    """
    if field not in row:
        names = ", ".join(repr(other) for other in row)
        raise InputError(key, must=f"{name} has no field {field!r}", remedy=f"it has {names}")


def require_plain(value: Any, column: str, name: str, *, instead: str = "") -> None:
    """Refuse a value that does not become a prompt's text or an answer as its writer meant it.

    Args:
        value: of a row.
        column: that it stands in.
        name: of the row.
        instead: another remedy beside a better value.

    Raises:
        DataError: It is neither a text of Unicode characters nor a finite number nor a boolean.
    """
    problem = _not_plain(value)
    if problem:
        remedy = f"{_CORRECT}, or {instead}" if instead else _CORRECT
        raise DataError(name, value, f"in column {column!r} {problem}", remedy)


def _not_plain(value: Any) -> str:
    """Return what is wrong with a value; nothing for a text, a finite number or a boolean."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            unit = value[error.start]
            return f"must be Unicode text, but {unit!r} is half of a surrogate pair"
        return ""
    if isinstance(value, numbers.Integral):  # of any size; a boolean is one
        return ""
    if isinstance(value, numbers.Real | Decimal) and math.isfinite(value):
        return ""
    return "must be a text, a finite number or a boolean"
