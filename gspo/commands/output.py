"""How the commands of ``python -m gspo`` write their results: tables for people, and JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gspo.errors import InputError, printable


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row of cells, in columns."""
    table = [[printable(cell) for cell in row] for row in table]
    widths = []
    for column in zip(*table, strict=True):
        lengths = [len(cell) for cell in column]
        widths.append(max(lengths))
    lines = []
    for row in table:
        cells = []
        for cell, width in zip(row, widths, strict=True):
            cells.append(cell.ljust(width))
        line = "  ".join(cells)
        lines.append(line.rstrip())
    return lines


def without_nan(value: Any) -> Any:
    """Return plain values with null in place of numbers that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json FILE``, which :func:`write_result` follows."""
    parser.add_argument("--json", metavar="FILE", help="write JSON here; - is the standard output")


def write_result(result: Any, in_words: Callable[[Any], str], json_file: str | None) -> None:
    """Print a command's result for people, or write it as JSON.

    Args:
        result: Plain values; numbers that are not finite become null.
        in_words: Makes the text for people.
        json_file: What ``--json`` names: ``-`` prints one line, None prints the text.

    Raises:
        InputError: The file cannot be written.
    """
    result = without_nan(result)
    if json_file is None:
        text = in_words(result)
        print(text)
    elif json_file == "-":
        line = json.dumps(result)
        print(line)
    else:
        text = json.dumps(result, indent=2)
        _write(json_file, text)
        print(f"wrote {json_file}", file=sys.stderr)


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_text(text + "\n")
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise InputError("--json", file, problem, "choose another file") from error
