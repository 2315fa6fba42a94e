"""Compare the metric rows of two runs: the same numbers, times aside.

    python benchmarks/same_numbers.py runs/before runs/after

It shows whether a change that should alter no number has altered one. The rows are those of
``metrics.jsonl``; metrics that measure time are left out. It prints the largest relative difference
by metric and exits with 1 where one is above ``--tolerance`` (default 0: bit for bit).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

TIMES = ("time/", "tokens_per_second", "mfu", "peak_memory_gib", "reserved_memory_gib")


def read_rows(folder: Path) -> list[dict[str, float]]:
    """Return the metric rows of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def relative_difference(one: float, other: float) -> float:
    """Return the difference as a share of the larger value; 0 for equal ones."""
    if one == other:
        return 0.0
    return abs(one - other) / max(abs(one), abs(other))


def compare(
    before: list[dict[str, float]], after: list[dict[str, float]]
) -> tuple[list[str], dict[str, float]]:
    """Return what is there in one run alone, and the largest difference by metric."""
    problems = []
    if len(before) != len(after):
        problems.append(f"{len(before)} rows before, {len(after)} after")
    differences: dict[str, float] = {}
    for one, other in zip(before, after, strict=False):
        for name in sorted(one.keys() | other.keys()):
            if name.startswith(TIMES):
                continue
            if name not in one or name not in other:
                problems.append(f"step {one['step']}: {name} is in one of the runs alone")
                continue
            difference = relative_difference(one[name], other[name])
            differences[name] = max(differences.get(name, 0.0), difference)
    return problems, differences


def main() -> int:
    """Print the comparison and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative; default 0")
    args = parser.parse_args()
    before, after = read_rows(args.before), read_rows(args.after)
    problems, differences = compare(before, after)
    for name, difference in differences.items():
        if difference > args.tolerance:
            problems.append(f"{name}: relative difference {difference:.2e}")
    for problem in problems[:40]:
        print(problem)
    largest = max(differences.values(), default=0.0)
    print(
        f"{len(before)} rows, {len(differences)} metrics, largest relative difference "
        f"{largest:.2e}: {'DIFFERENT' if problems else 'the same'}"
    )
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
