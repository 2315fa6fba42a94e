"""Two runs of the recipe side by side: until where they drew the same documents, and their held-out accuracy.

python -m gspo.demo --base-only
tune run gspo_full_finetune --config tiny/gspo output_dir=runs/one
tune run --nproc_per_node 4 gspo_full_finetune --config tiny/gspo context_parallel_size=2 output_dir=runs/four
python benchmarks/compare_runs.py runs/one runs/four --json benchmarks/results/DATE-ranks.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hardware import hardware

SAME = 1e-6  # mean rewards of a rollout that differ by less are of the same completions
EXACT = ("loss", "grad_norm", "kl_new_old", "reward/mean", "length/mean")


def read(folder: Path) -> list[dict]:
    """The rows of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Print the comparison and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    one, other = (read(folder) for folder in args.runs)
    pairs = list(zip(one, other, strict=False))
    parted = next(
        (
            a["step"]
            for a, b in pairs
            if abs(a.get("reward/mean", 0) - b.get("reward/mean", 0)) > SAME
        ),
        None,
    )
    found = {
        "same_documents_before_step": parted,
        "relative_difference_at_step_20": {
            key: abs(a[key] - b[key]) / abs(a[key])
            for a, b in pairs
            if a["step"] == 20
            for key in EXACT
            if a.get(key)
        },
        "held_out": [
            {
                "step": a["step"],
                **{
                    folder.name: row["eval/accuracy"]
                    for folder, row in zip(args.runs, (a, b), strict=True)
                },
            }
            for a, b in pairs
            if "eval/accuracy" in a
        ],
        "seconds": {
            folder.name: sum(row.get("time/step", 0) for row in rows)
            for folder, rows in zip(args.runs, (one, other), strict=True)
        },
        "hardware": hardware(),
    }
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
