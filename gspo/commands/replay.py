"""``python -m gspo replay``: the command line, and the scores as text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gspo.commands.output import add_json_option, aligned, write_result
from gspo.config import show_errors
from gspo.errors import printable, require
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
    first = score(dump, args.preset, args.overrides)
    scores = [first]
    if args.against:
        second = score(dump, args.against)
        scores.append(second)
    documents = find_documents(dump)
    replayed = result(file, dump, documents, scores, args.top)
    write_result(replayed, report, args.json)


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
    tables = [_metric_rows(replayed)]
    for objective in replayed["objectives"]:
        tables.append(_length_rows(objective))
    tables.append(_document_rows(replayed))
    lines = [printable(line) for line in _head_lines(replayed)]
    for table in tables:
        rows = list(table)
        lines.append("")
        lines += aligned(rows)
    return "\n".join(lines)


def _head_lines(replayed: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{replayed['file']}: step {replayed['step']}, {replayed['documents_in_file']} documents "
        f"of {replayed['tokens_in_file']} tokens; the denominators count "
        f"{replayed['num_documents']} and {replayed['num_label_tokens']}"
    )
    for row in replayed["quarantined"]:
        not_finite = ", ".join(row["not_finite"])
        yield (
            "quarantined, in no sum and no denominator: "
            f"prompt {row['prompt_id']}, group {row['group_id']}, rank {row['rank']}, "
            f"not finite: {not_finite}"
        )
    of_file = replayed["advantages"]
    for objective in replayed["objectives"]:
        yield _objective_line(objective)
        of_objective = objective["advantages"]
        if of_objective != of_file:
            yield f"  with the file's advantages ({of_file}), not its own ({of_objective})"


def _objective_line(objective: dict[str, Any]) -> str:
    arguments = dict(objective["loss"])
    component = arguments.pop("_component_")
    words = []
    for key, value in arguments.items():
        words.append(f"{key} {value}")
    in_words = ", ".join(words)
    name = objective["name"]
    denominator = objective["denominator"]
    return f"{name}: {component}, {in_words}; over {denominator:g}"


def _metric_rows(replayed: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a row for each metric that an objective has, with the logged value before it."""
    header = ["", "logged"]
    columns = [replayed["logged"]]
    names: set[str] = set()
    for objective in replayed["objectives"]:
        metrics = objective["metrics"]
        header.append(objective["name"])
        columns.append(metrics)
        names |= metrics.keys()
    yield header
    for name in sorted(names):
        cells = [name]
        for column in columns:
            value = column.get(name)
            cells.append(_number(value))
        yield cells


def _length_rows(objective: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a row for each range of lengths that has documents, and one for all."""
    name = objective["name"]
    yield [f"{name}: length", "documents", "tokens", "gradient", *_CLIP_HEADER]
    by_length = objective["by_length"]
    for row in by_length:
        if row["documents"]:
            yield _length_cells(row)
    every = {
        "length": "all",
        "documents": _sum_of(by_length, "documents"),
        "tokens": _sum_of(by_length, "tokens"),
        "gradient": _sum_of(by_length, "gradient"),
        "clip": objective["clip"],
    }
    yield _length_cells(every)


def _sum_of(rows: list[dict[str, Any]], key: str) -> Any:
    """Add up a column; None if a row has no value."""
    values = [row[key] for row in rows]
    if None in values:
        return None
    return sum(values)


def _length_cells(row: dict[str, Any]) -> list[str]:
    cells = [row["length"]]
    cells.append(str(row["documents"]))
    cells.append(str(row["tokens"]))
    cells.append(_share(row["gradient"], 3))
    shares = row["clip"]
    for counted in ("documents", "tokens"):
        for clip in _CLIPS:
            share = shares and shares[counted][clip]
            cells.append(_share(share, 3))
    return cells


def _document_rows(replayed: dict[str, Any]) -> Iterator[list[str]]:
    header = ["prompt", "group", "length", "advantage", "reward", "log-ratio"]
    for objective in replayed["objectives"]:
        name = objective["name"]
        header += [f"{name}: ratio", f"{name}: clipped", f"{name}: gradient"]
    yield header
    for row in replayed["documents"]:
        cells = [row["prompt_id"]]
        cells.append(str(row["group_id"]))
        cells.append(str(row["length"]))
        for key in ("advantage", "reward", "mean_log_ratio"):
            value = row[key]
            cells.append(_number(value))
        for objective in row["objectives"]:
            cells += _cells_of_objective(objective, row)
        yield cells


def _cells_of_objective(objective: dict[str, Any], row: dict[str, Any]) -> list[str]:
    ratio = _number(objective["ratio"])
    gradient = _share(objective["gradient"], 4)
    if row["not_finite"]:
        clipped = "quarantined"
    else:
        clipped = _clipped(objective["clipped_tokens"], row["length"])
    return [ratio, clipped, gradient]


def _clipped(tokens: dict[str, int] | None, length: int) -> str:
    """Return ``low``, ``high``, or how many tokens are.

    ``outside`` is a ratio outside the clip range that keeps its gradient.
    """
    if not tokens:
        return ""
    low = tokens["binding_low"]
    high = tokens["binding_high"]
    outside = tokens["any"] - low - high
    counts = {"low": low, "high": high, "outside": outside}
    words = []
    for kind, count in counts.items():
        if count:
            words.append(kind if count == length else f"{kind} {count}/{length}")
    return " ".join(words) or "no"


def _share(value: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}"
