"""What a source of prompts gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from gspo.errors import InputError


class Rows(Protocol):
    """A source of prompts: rows by index, and where each comes from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row's fields by name, for the template, the answer and the prompt's metadata."""
        ...

    def name(self, index: int) -> str:
        """A stable id that leads back to the source, e.g. ``train.jsonl:17``."""
        ...


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"source: {source} does not exist (looked for {path.absolute()})")
    return path


def _require_rows(rows: Rows, source: str) -> None:
    if len(rows) == 0:
        raise InputError(f"source: {source} is empty; a run needs at least one prompt")
