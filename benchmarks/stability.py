"""Whether a long run of ``tiny/gspo`` stays finite and keeps what it has learned.

    python -m gspo.demo --base-only
    python benchmarks/stability.py --json benchmarks/results/DATE-stability.json

Trains 400 optimizer steps from the demo's base policy with held-out evaluation every 20, and reports the largest fall
of the accuracy below its best so far, the steps that were not finite, and the KL at the first step.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from hardware import hardware

from gspo.demo.__main__ import train

STEPS, EVERY = 400, 20


def main() -> None:
    """Trains, then reads the run's metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="folder made by gspo.demo --base-only"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    train(args.run, seed=args.seed, overrides=[f"num_steps={STEPS}", f"eval.every_n_steps={EVERY}"])
    report = hardware() | summarize(args.run)
    print(json.dumps(report, indent=2))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def summarize(run: Path) -> dict:
    """What the run's files say."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    curve = [
        r["eval/accuracy"] for r in records if "eval/accuracy" in r
    ]  # from step 0, before the first update
    best = fall = 0.0
    for accuracy in curve:
        best = max(best, accuracy)
        fall = max(fall, best - accuracy)
    trained = [r for r in records if r.get("documents")]
    return {
        "steps": records[-1]["step"],
        "seed": summary["seed"],
        "held_out_accuracy": [round(accuracy, 4) for accuracy in curve],
        "largest_fall_below_the_best": round(fall, 4),
        "steps_not_finite": sum(not math.isfinite(r.get("grad_norm") or math.nan) for r in trained),
        "skipped_steps": trained[-1]["skipped_steps"],
        "kl_new_old_at_step_1": next(r["kl_new_old"] for r in records if "kl_new_old" in r),
    }


if __name__ == "__main__":
    main()
