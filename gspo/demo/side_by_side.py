"""Held-out answers of a run before and after training, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_WIDTH = 38  # characters of a completion in a table


def write_table(output: Path, *, count: int = 10) -> str:
    """Write ``before_after.md`` into the folder of a run and return the table as text.

    Args:
        output: with the run's ``held_out.jsonl``.
        count: questions, the first ones: none is chosen for how it came out.
    """
    path = output / "held_out.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    before = _of_step(rows, min(row["step"] for row in rows))
    after = _of_step(rows, max(row["step"] for row in rows))
    lines = [_line("answer", "before", "after"), _line("---", "---", "---")]
    for prompt_id in list(before)[:count]:
        first = before[prompt_id]
        last = after[prompt_id]
        lines.append(_line(first["answer"], _cell(first), _cell(last)))
    table = "\n".join(lines)
    (output / "before_after.md").write_text(table + "\n")
    return table


def _of_step(rows: list[dict[str, Any]], step: int) -> dict[str, dict[str, Any]]:
    """Return the rows of an evaluation by their prompt."""
    return {row["prompt_id"]: row for row in rows if row["step"] == step}


def _cell(row: dict[str, Any]) -> str:
    sign = "+" if row["correct"] else "-"
    text = " ".join(row["completion"].split()).replace("|", "\\|")
    if len(text) > _WIDTH:
        text = f"{text[: _WIDTH - 3]}..."
    return f"{sign} {text}"


def _line(answer: str, before: str, after: str) -> str:
    width = _WIDTH + 2
    return f"| {answer:<6} | {before:<{width}} | {after:<{width}} |"
