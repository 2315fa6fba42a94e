r"""Compare two runs of the recipe: until where they drew the same documents, and their accuracy.

python -m gspo.demo --base-only
tune run gspo_full_finetune --config tiny/gspo output_dir=runs/one
tune run --nproc_per_node 4 gspo_full_finetune --config tiny/gspo context_parallel_size=2 \
    output_dir=runs/four
python benchmarks/compare_runs.py runs/one runs/four --json benchmarks/results/DATE-ranks.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hardware import hardware

SAME = 1e-6  # mean rewards of a rollout that differ by less are of the same completions
EXACT = ("loss", "grad_norm", "kl_new_old", "reward/mean", "length/mean")
EXACT_STEP = 20  # at which these are compared

Row = dict[str, Any]


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def parting_step(pairs: list[tuple[Row, Row]]) -> int | None:
    """Return the first step whose documents differ; None if there is none."""
    for one, other in pairs:
        difference = one.get("reward/mean", 0) - other.get("reward/mean", 0)
        if abs(difference) > SAME:
            return one["step"]
    return None


def relative_differences(pairs: list[tuple[Row, Row]]) -> dict[str, float]:
    """Return the relative difference by metric at :data:`EXACT_STEP`."""
    differences = {}
    for one, other in pairs:
        if one["step"] != EXACT_STEP:
            continue
        for key in EXACT:
            if one.get(key):
                differences[key] = abs(one[key] - other[key]) / abs(one[key])
    return differences


def held_out(pairs: list[tuple[Row, Row]], names: list[str]) -> list[Row]:
    """Return the accuracies of both runs at each evaluation."""
    rows = []
    for one, other in pairs:
        if "eval/accuracy" in one:
            accuracies = [one["eval/accuracy"], other["eval/accuracy"]]
            rows.append({"step": one["step"], **dict(zip(names, accuracies, strict=True))})
    return rows


def seconds_of(rows: list[Row]) -> float:
    """Return the time that the steps of a run took."""
    return sum(row.get("time/step", 0) for row in rows)


def main() -> None:
    """Print the comparison and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    one, other = (read_rows(folder) for folder in args.runs)
    names = [folder.name for folder in args.runs]
    pairs = list(zip(one, other, strict=False))
    comparison = {
        "same_documents_before_step": parting_step(pairs),
        f"relative_difference_at_step_{EXACT_STEP}": relative_differences(pairs),
        "held_out": held_out(pairs, names),
        "seconds": {names[0]: seconds_of(one), names[1]: seconds_of(other)},
        "hardware": hardware(),
    }
    text = json.dumps(comparison, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
