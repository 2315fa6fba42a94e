"""``python -m gspo presets``: print the table of objectives."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from gspo.commands.output import aligned, write_json
from gspo.losses.presets import LENGTHS, rows


def _text(found: list[dict[str, Any]]) -> str:
    table = [
        [
            "preset",
            "ratio",
            "surrogate",
            "band",
            "aggregation",
            "advantage",
            *map(str, LENGTHS),
            "x",
            "x indep.",
        ]
    ]
    for row in found:
        band = ", ".join(
            "none" if row[k] is None else f"{row[k]:g}" for k in ("clip_low", "clip_high")
        )
        names = [row[k] for k in ("preset", "ratio", "surrogate")]
        numbers = [*row["weights"], row["gradient_aligned"], row["gradient_independent"]]
        table.append(
            [*names, band, row["aggregation"], row["advantage"], *(f"{x:.3g}" for x in numbers)]
        )
    sources = [
        f"{row['preset']}: {row['source']}" + (f"; {row['note']}" if row["note"] else "")
        for row in found
    ]
    return "\n".join([*aligned(table), "", *_LEGEND, "", *sources])


_LEGEND = (
    "Under a number: what a document of so many tokens weighs in the gradient, in a step of these four, at a ratio of",
    "1 and with equal advantages. x: the gradient's norm over that of gspo where the gradients of all tokens agree;",
    "x indep.: where they are independent. To carry settings over from gspo, divide SGD's learning rate by that factor",
    "and multiply clip_grad_norm by it; Adam takes it out.",
    "Here dr_grpo has a constant length of 1024, and pipelinerl a batch size of 4.",
)


def main(arguments: list[str]) -> None:
    """Print the table, or with ``--json FILE`` write it, ``-`` being the output.

    Raises:
        InputError: the file cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m gspo presets", description="The objectives that a config can name."
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON here; - is the output")
    to = parser.parse_args(arguments).json
    found = rows()
    text = _text(found) if to is None else json.dumps(found, indent=2)
    if to in (None, "-"):
        sys.stdout.write(text + "\n")
    else:
        write_json(to, text)
