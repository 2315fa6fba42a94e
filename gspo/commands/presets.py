"""``python -m gspo presets``: print the table of objectives."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from gspo.commands.output import add_json_option, aligned, write_result
from gspo.losses.presets import LENGTHS, rows

_HEADER = (
    "preset",
    "ratio",
    "surrogate",
    "clip range",
    "aggregation",
    "advantage",
    *map(str, LENGTHS),
    "x",
    "x indep.",
)
_LEGEND = (
    "Under a number: what a document of so many tokens weighs in the gradient, in a step of these",
    "four, at a ratio of 1 and with equal advantages. x: the gradient's norm over that of gspo",
    "where the gradients of all tokens agree; x indep.: where they are independent. To carry",
    "settings over from gspo, divide SGD's learning rate by that factor and multiply",
    "clip_grad_norm by it; Adam takes it out.",
    "Here dr_grpo has a constant length of 1024, and pipelinerl a batch size of 4.",
)


def main(arguments: list[str]) -> None:
    """Print the objectives that a config can name.

    Raises:
        InputError: The file of ``--json`` cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m gspo presets", description="The objectives that a config can name."
    )
    add_json_option(parser)
    args = parser.parse_args(arguments)
    write_result(rows(), _in_words, args.json)


def _in_words(presets: list[dict[str, Any]]) -> str:
    table: list[Sequence[str]] = [_HEADER]
    sources = []
    for preset in presets:
        table.append(_cells(preset))
        sources.append(_source(preset))
    lines = [*aligned(table), "", *_LEGEND, "", *sources]
    return "\n".join(lines)


def _source(preset: dict[str, Any]) -> str:
    """Return a preset's name, paper and note."""
    source = f"{preset['preset']}: {preset['source']}"
    note = preset["note"]
    if note:
        source += f"; {note}"
    return source


def _cells(preset: dict[str, Any]) -> list[str]:
    low = _end(preset["clip_low"])
    high = _end(preset["clip_high"])
    numbers = [
        *preset["weights"],
        preset["gradient_aligned"],
        preset["gradient_independent"],
    ]
    return [
        preset["preset"],
        preset["ratio"],
        preset["surrogate"],
        f"{low}, {high}",
        preset["aggregation"],
        preset["advantage"],
        *(f"{number:.3g}" for number in numbers),
    ]


def _end(bound: float | None) -> str:
    """Return an end of the clip range."""
    if bound is None:
        return "none"
    return f"{bound:g}"
