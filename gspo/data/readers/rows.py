"""A source of prompts as a reader sees it: rows by index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from gspo.errors import require


class Rows(Protocol):
    """A source of prompts: rows by index, and where each comes from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the row's fields by name, for template, answer and the prompt's metadata."""
        ...

    def name(self, index: int) -> str:
        """Return a stable id that leads back to the source, e.g. ``train.jsonl:17``."""
        ...


def existing_path(source: str) -> Path:
    """Return the path of a file or folder that is there.

    Raises:
        InputError: It is not.
    """
    path = Path(source).expanduser()
    looked_for = f"does not exist (looked for {path.absolute()})"
    require(path.exists(), "source", source, looked_for)
    return path


def require_rows(rows: Rows, source: str) -> None:
    """Refuse a source without rows.

    Raises:
        InputError: There are none.
    """
    require(len(rows) > 0, "source", source, "is empty", "a run needs at least one prompt")
