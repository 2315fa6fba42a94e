"""``python -m gspo replay``: the command line, and the scores as text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gspo.commands.output import add_json_option, aligned, write_result
from gspo.config import show_errors
from gspo.errors import require
from gspo.replay import find_documents, result, score
from gspo.run.dump import read

# Columns of clips: of documents, then of tokens.
_CLIPS = ("any", "binding", "binding_low", "binding_high")
_CLIP_HEADER = (
    "documents: any",
    "binding",
    "low",
    "high",
    "tokens: any",
    "binding",
    "low",
    "high",
)


@show_errors
def main(arguments: list[str]) -> None:
    """Score a dumped step again, under the run's own objective, a preset, or two side by side.

    Raises:
        InputError: An option, an override or the file.
    """
    args = _parse(arguments)
    file = Path(args.file)
    dump = read(file)
    scores = [score(dump, args.preset, args.overrides)]
    if args.against:
        scores.append(score(dump, args.against))
    write_result(result(file, dump, find_documents(dump), scores, args.top), report, args.json)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gspo replay",
        description="Score a dumped step again, under the run's own objective, a preset, or two "
        "side by side.",
    )
    option = parser.add_argument
    option("file", help="a file of a run's folder dumps, see dump_every_n_steps")
    option("--preset", help="an objective of `python -m gspo presets`; default: the run's own")
    option("--against", metavar="PRESET", help="another beside it; overrides are for the first")
    option("--top", type=int, default=20, help="documents to list; default %(default)s")
    add_json_option(parser)
    option(
        "overrides", nargs="*", metavar="key=value", help="of the objective, as loss.clip_high=0.3"
    )
    args = parser.parse_intermixed_args(arguments)
    remedy = "give the number of documents to list"
    require(args.top >= 0, "--top", args.top, "must be 0 or more", remedy)
    return args


def report(replayed: dict[str, Any]) -> str:
    """Return the result in lines for people."""
    lines = [*_head_lines(replayed), "", *aligned(list(_metric_rows(replayed)))]
    for objective in replayed["objectives"]:
        lines += ["", *aligned(list(_length_rows(objective)))]
    lines += ["", *aligned(list(_document_rows(replayed)))]
    return "\n".join(lines)


def _head_lines(replayed: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{replayed['file']}: step {replayed['step']}, {replayed['documents_in_file']} documents "
        f"of {replayed['tokens_in_file']} tokens; the denominators count "
        f"{replayed['num_documents']} and {replayed['num_label_tokens']}"
    )
    for row in replayed["quarantined"]:
        yield (
            "quarantined, in no sum and no denominator: "
            f"prompt {row['prompt_id']}, group {row['group_id']}, rank {row['rank']}, "
            f"not finite: {', '.join(row['not_finite'])}"
        )
    for objective in replayed["objectives"]:
        yield _objective_line(objective)
        if objective["advantages"] != replayed["advantages"]:
            yield (
                f"  with the file's advantages ({replayed['advantages']}), "
                f"not its own ({objective['advantages']})"
            )


def _objective_line(objective: dict[str, Any]) -> str:
    arguments = dict(objective["loss"])
    component = arguments.pop("_component_")
    in_words = ", ".join(f"{key} {value}" for key, value in arguments.items())
    return f"{objective['name']}: {component}, {in_words}; over {objective['denominator']:g}"


def _metric_rows(replayed: dict[str, Any]) -> Iterator[list[str]]:
    objectives = replayed["objectives"]
    yield ["", "logged", *(objective["name"] for objective in objectives)]
    names: set[str] = set()
    for objective in objectives:
        names |= objective["metrics"].keys()
    for name in sorted(names):
        columns = [replayed["logged"], *(objective["metrics"] for objective in objectives)]
        yield [name, *(_number(column.get(name)) for column in columns)]


def _length_rows(objective: dict[str, Any]) -> Iterator[list[str]]:
    yield [f"{objective['name']}: length", "documents", "tokens", "gradient", *_CLIP_HEADER]
    by_length = objective["by_length"]
    for row in by_length:
        if row["documents"]:
            yield _length_cells(row)
    shares = [row["gradient"] for row in by_length]
    every = {
        "length": "all",
        "documents": sum(row["documents"] for row in by_length),
        "tokens": sum(row["tokens"] for row in by_length),
        "gradient": None if None in shares else sum(shares),
        "clip": objective["clip"],
    }
    yield _length_cells(every)


def _length_cells(row: dict[str, Any]) -> list[str]:
    cells = [row["length"], str(row["documents"]), str(row["tokens"]), _share(row["gradient"], 3)]
    for counted in ("documents", "tokens"):
        for clip in _CLIPS:
            cells.append(_share(row["clip"] and row["clip"][counted][clip], 3))
    return cells


def _document_rows(replayed: dict[str, Any]) -> Iterator[list[str]]:
    header = ["prompt", "group", "length", "advantage", "reward", "log-ratio"]
    for objective in replayed["objectives"]:
        header += [f"{objective['name']}: {of}" for of in ("ratio", "clipped", "gradient")]
    yield header
    for row in replayed["documents"]:
        cells = [row["prompt_id"], str(row["group_id"]), str(row["length"])]
        cells += [_number(row[key]) for key in ("advantage", "reward", "mean_log_ratio")]
        for objective in row["objectives"]:
            cells += _cells_of_objective(objective, row)
        yield cells


def _cells_of_objective(objective: dict[str, Any], row: dict[str, Any]) -> list[str]:
    clipped = "quarantined"
    if not row["not_finite"]:
        clipped = _clipped(objective["clipped_tokens"], row["length"])
    return [_number(objective["ratio"]), clipped, _share(objective["gradient"], 4)]


def _clipped(tokens: dict[str, int] | None, length: int) -> str:
    """Return ``low``, ``high``, or how many tokens are.

    ``outside`` is a ratio outside the clip range that keeps its gradient.
    """
    if not tokens:
        return ""
    low, high = tokens["binding_low"], tokens["binding_high"]
    counts = {"low": low, "high": high, "outside": tokens["any"] - low - high}
    words = []
    for kind, count in counts.items():
        if count:
            words.append(kind if count == length else f"{kind} {count}/{length}")
    return " ".join(words) or "no"


def _share(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
