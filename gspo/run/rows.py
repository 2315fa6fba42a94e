"""JSONL files that a full disk does not end: rows wait in memory until they can be written."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torchtune import utils

log = utils.get_logger("INFO")

MAX_WAITING = 1000  # rows of a file that cannot be written


class RowFile:
    """A file of JSON objects, one a line, with null for a number that JSON cannot hold.

    Rows that cannot be written are kept, up to 1,000 of them, and written with the next ones; a
    warning says so once. A metric is not worth the end of a run. Threads may share it: a document
    is quarantined by the one that prefetches or by the one that trains.

    Args:
        path: of the file, which the first row makes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._num_lost = 0
        self._fails = False
        self._lock = threading.Lock()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, and before them those that wait."""
        lines = [json.dumps(_clean(row)) + "\n" for row in rows]
        with self._lock:
            self._waiting += lines
            self._write()

    def _write(self) -> None:
        try:
            _append(self.path, "".join(self._waiting))
        except OSError as error:
            self._keep(error)
        else:
            self._waiting.clear()
            if self._fails:
                log.info("%s can be written again.", self.path)
            self._fails = False

    def close(self) -> None:
        """Try the rows that wait once more, and say how many are lost."""
        if self._waiting:
            self.append([])
        num_lost = self._num_lost + len(self._waiting)
        if num_lost:
            log.warning("%s lacks %d rows, which could not be written.", self.path, num_lost)

    def _keep(self, error: OSError) -> None:
        """Keep the latest rows, and warn unless that is known."""
        num_over = max(len(self._waiting) - MAX_WAITING, 0)
        del self._waiting[:num_over]
        self._num_lost += num_over
        if not self._fails:
            log.warning(
                "%s could not be written: %s. The run goes on and keeps up to %d rows for later.",
                self.path,
                error,
                MAX_WAITING,
            )
        self._fails = True


def _append(path: Path, text: str) -> None:
    """Append text whole or not at all: half a line would spoil the file for its readers."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def _clean(value: Any) -> Any:
    """Return a value with null for numbers, at any depth, that JSON cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
