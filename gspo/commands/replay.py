"""``python -m gspo replay``: score a dumped step again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gspo.commands.output import aligned, without_nan, write_json
from gspo.config.checks import require
from gspo.config.command_line import show_errors
from gspo.replay import find_documents, result, score
from gspo.run.dump import read


def report(found: dict[str, Any]) -> str:
    """The result in lines for people."""
    file, step, objectives = found["file"], found["step"], found["objectives"]
    lines = [
        f"{file}: step {step}, {found['documents_in_file']} documents of {found['tokens_in_file']} tokens; the "
        f"denominators count {found['num_documents']} and {found['num_label_tokens']}"
    ]
    for row in found["quarantined"]:
        lines.append(
            f"quarantined, in no sum and no denominator: prompt {row['prompt_id']}, group {row['group_id']}, rank "
            f"{row['rank']}, not finite: {', '.join(row['not_finite'])}"
        )
    for objective in objectives:
        settings = [f"{k} {v}" for k, v in objective["loss"].items() if k != "_component_"]
        component = objective["loss"]["_component_"]
        lines.append(
            f"{objective['name']}: {component}, {', '.join(settings)}; over {objective['denominator']:g}"
        )
        if objective["advantages"] != found["advantages"]:
            lines.append(
                f"  with the file's advantages ({found['advantages']}), not its own ({objective['advantages']})"
            )
    names = sorted(set().union(*(o["metrics"] for o in objectives)))
    table = [["", "logged", *(o["name"] for o in objectives)]]
    for name in names:
        table.append(
            [
                name,
                *(
                    _number(of.get(name))
                    for of in (found["logged"], *(o["metrics"] for o in objectives))
                ),
            ]
        )
    lines += ["", *aligned(table)]
    for objective in objectives:
        lines += ["", *aligned(list(_length_lines(objective)))]
    lines += ["", *aligned(list(_document_lines(found)))]
    return "\n".join(lines)


def _length_lines(objective: dict[str, Any]) -> Iterator[list[str]]:
    clips = ["documents: any", "binding", "low", "high", "tokens: any", "binding", "low", "high"]
    yield [f"{objective['name']}: length", "documents", "tokens", "gradient", *clips]
    keys = [
        (of, key)
        for of in ("documents", "tokens")
        for key in ("any", "binding", "binding_low", "binding_high")
    ]
    every = {
        key: sum(row[key] for row in objective["by_length"]) for key in ("documents", "tokens")
    }
    shares = [row["gradient"] for row in objective["by_length"]]
    every["gradient"] = None if None in shares else sum(shares)
    rows = [row for row in objective["by_length"] if row["documents"]]
    for row in (*rows, {"length": "all", **every, "clip": objective["clip"]}):
        clips_of_row = [_share(row["clip"] and row["clip"][of][key], 3) for of, key in keys]
        yield [
            row["length"],
            str(row["documents"]),
            str(row["tokens"]),
            _share(row["gradient"], 3),
            *clips_of_row,
        ]


def _document_lines(found: dict[str, Any]) -> Iterator[list[str]]:
    names = [o["name"] for o in found["objectives"]]
    of_objective = [
        f"{name}: {what}" for name in names for what in ("ratio", "clipped", "gradient")
    ]
    yield ["prompt", "group", "length", "advantage", "reward", "log-ratio", *of_objective]
    for row in found["documents"]:
        numbers = [_number(row[key]) for key in ("advantage", "reward", "mean_log_ratio")]
        cells = [row["prompt_id"], str(row["group_id"]), str(row["length"]), *numbers]
        for o in row["objectives"]:
            how = "quarantined" if row["not_finite"] else _how(o["clipped_tokens"], row["length"])
            cells += [_number(o["ratio"]), how, _share(o["gradient"], 4)]
        yield cells


def _how(tokens: dict[str, int] | None, length: int) -> str:
    """``low``, ``high``, or how many tokens are; ``outside`` is a ratio outside the band that keeps its gradient."""
    if not tokens:
        return ""
    kinds = {"low": tokens["binding_low"], "high": tokens["binding_high"]}
    kinds["outside"] = tokens["any"] - sum(kinds.values())
    return (
        " ".join(kind if n == length else f"{kind} {n}/{length}" for kind, n in kinds.items() if n)
        or "no"
    )


def _share(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


@show_errors
def main(arguments: list[str]) -> None:
    """Score a dumped step again, under the run's own objective, a preset, or two next to each other.

    Raises:
        InputError: an option, an override or the file.
    """
    parser = argparse.ArgumentParser(
        prog="python -m gspo replay", description=(main.__doc__ or "").splitlines()[0]
    )
    parser.add_argument("file", help="a file of a run's folder dumps, see dump_every_n_steps")
    parser.add_argument(
        "--preset", help="an objective of `python -m gspo presets`; default: the run's own"
    )
    parser.add_argument(
        "--against", metavar="PRESET", help="another beside it; overrides are for the first"
    )
    parser.add_argument(
        "--top", type=int, default=20, help="documents to list; default %(default)s"
    )
    parser.add_argument("--json", metavar="FILE", help="write JSON here; - is the output")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the objective, as loss.clip_high=0.3"
    )
    args = parser.parse_intermixed_args(arguments)
    require(
        args.top >= 0,
        "--top",
        args.top,
        "must be 0 or more",
        "give the number of documents to list",
    )
    dump = read(Path(args.file))
    scores = [score(dump, args.preset, args.overrides)] + (
        [score(dump, args.against)] if args.against else []
    )
    found = without_nan(result(Path(args.file), dump, find_documents(dump), scores, args.top))
    if args.json is None:
        print(report(found))
    elif args.json == "-":
        print(json.dumps(found))
    else:
        write_json(args.json, json.dumps(found, indent=2))
