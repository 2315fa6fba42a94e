"""Whether a long run of ``tiny/gspo`` stays finite and keeps what it has learned.

    python -m gspo.demo --base-only
    python benchmarks/stability.py --json benchmarks/results/DATE-stability.json

Trains 400 optimizer steps from the demo's base policy with held-out evaluation every 20, and
reports the largest fall of the accuracy below its best so far, the steps that were not finite, and
the KL at the first step.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from hardware import hardware

from gspo.demo.__main__ import train

STEPS = 400
EVALUATE_EVERY = 20  # steps


def main() -> None:
    """Train, then read the run's metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="folder made by gspo.demo --base-only"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    overrides = [f"num_steps={STEPS}", f"eval.every_n_steps={EVALUATE_EVERY}"]
    train(args.run, seed=args.seed, overrides=overrides)
    report = json.dumps(hardware() | summarize(args.run), indent=2)
    print(report)
    if args.json:
        args.json.write_text(report + "\n")


def summarize(run: Path) -> dict:
    """Return the figures that the run's files hold."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    # From step 0, before the first update.
    accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    trained = [row for row in rows if row.get("documents")]
    num_not_finite = sum(not math.isfinite(row.get("grad_norm") or math.nan) for row in trained)
    kl = [row["kl_new_old"] for row in rows if "kl_new_old" in row]
    return {
        "steps": rows[-1]["step"],
        "seed": summary["seed"],
        "held_out_accuracy": [round(accuracy, 4) for accuracy in accuracies],
        "largest_fall_below_the_best": round(largest_fall(accuracies), 4),
        "steps_not_finite": num_not_finite,
        "skipped_steps": trained[-1]["skipped_steps"],
        "kl_new_old_at_step_1": kl[0],
    }


def largest_fall(accuracies: list[float]) -> float:
    """Return the largest fall of the accuracy below its best so far."""
    best = 0.0
    fall = 0.0
    for accuracy in accuracies:
        best = max(best, accuracy)
        fall = max(fall, best - accuracy)
    return fall


if __name__ == "__main__":
    main()
