"""The whole way in one command: a base policy warm-started by SFT, then GSPO, both through ``tune run``.

    python -m gspo.demo --output runs/demo --seed 0

writes the run folder that the README describes. ``--base-only`` stops before GSPO.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

START_ACCURACY = (
    0.3  # of the base policy, at least: often wrong, and right often enough to learn from
)


MAX_SFT_ROUNDS = 6  # of 400 steps; the step at which addition "clicks" differs by seed


def main() -> None:
    """Parses the command line and runs the steps that are asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m gspo.demo", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights, the questions and the sampling"
    )
    parser.add_argument(
        "--base-only", action="store_true", help="make the base policy and its data, then stop"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the config tiny/gspo"
    )
    args = parser.parse_args()
    # A model this small gains a quarter from a second thread, and loses tenfold when another process wants the core.
    # Read when torch is first imported, which is below, and in the processes that start from here.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    shutil.rmtree(args.output, ignore_errors=True)
    make_base(args.output, seed=args.seed)
    if args.base_only:
        print(
            f"The base policy is in {args.output / 'base'}, its questions in {args.output / 'data'}."
        )
        return
    train(args.output, seed=args.seed, overrides=args.overrides)
    report(args.output, seconds=time.perf_counter() - started)


def make_base(output: Path, *, seed: int) -> None:
    """An untrained model with its data, then torchtune's own SFT recipe, stopped while the policy is often wrong."""
    from gspo.tiny import make_untrained

    print(
        "Making a base policy: an untrained Qwen2 of half a million parameters, then SFT on worked examples."
    )
    start, file = output / "untrained", "model.safetensors"
    make_untrained(start, output / "data", seed=seed)
    for number in range(MAX_SFT_ROUNDS):
        folder = output / f"sft_{number}"
        overrides = {
            "output_dir": folder,
            "base_dir": start,
            "checkpointer.checkpoint_files": f"[{file}]",
            "data_dir": output / "data",
            "seed": seed * MAX_SFT_ROUNDS + number,
        }
        tune_run(
            "full_finetune_single_device",
            "tiny/sft",
            [f"{key}={value}" for key, value in overrides.items()],
        )
        checkpoints = sorted(
            folder.glob("epoch_*"), key=lambda path: int(path.name.removeprefix("epoch_"))
        )
        found = first_able(checkpoints, output / "data" / "validation.jsonl")
        if found is not None:
            break
        start, file = checkpoints[-1], "model-00001-of-00001.safetensors"
    shutil.copytree(found or start, output / "base")


def first_able(checkpoints: list[Path], questions: Path) -> Path | None:
    """The first checkpoint whose greedy accuracy on the validation questions reaches :data:`START_ACCURACY`."""
    from gspo.evaluation import evaluate
    from gspo.rewards.pool import RewardPool
    from gspo.tiny import load_sampler, read_prompts
    from gspo.types import SamplingParams

    pool = RewardPool(
        {"correct": {"function": "gspo.rewards.reasoning_gym", "marker": "="}}, num_workers=1
    )
    prompts = read_prompts(checkpoints[0], questions)
    try:
        for checkpoint in checkpoints:
            pairs = evaluate(
                load_sampler(checkpoint), pool, prompts, params=SamplingParams(max_new_tokens=10)
            )
            correct, total = pairs["eval/accuracy"]
            print(
                f"  {checkpoint}: {correct / total:.3f} of the validation questions right",
                flush=True,
            )
            if correct >= START_ACCURACY * total:
                return checkpoint
    finally:
        pool.close()
    return None


def train(output: Path, *, seed: int, overrides: list[str]) -> None:
    """GSPO from the base policy."""
    print("Training it with GSPO ...", flush=True)
    own = {
        "output_dir": output,
        "base_dir": output / "base",
        "data_dir": output / "data",
        "seed": seed,
    }
    tune_run(
        "gspo_full_finetune",
        "tiny/gspo",
        [f"{key}={value}" for key, value in own.items()] + overrides,
    )


def report(output: Path, *, seconds: float) -> None:
    """The curves, and what was reached."""
    from gspo.run.plot import plot_run

    plot_run(output)
    summary = json.loads((output / "summary.json").read_text())
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    print(
        f"\nHeld-out accuracy: {before:.3f} before, {after:.3f} after {summary['steps']} steps of GSPO."
    )
    print(f"{seconds:.0f} s in all. Curves: {output / 'curves.png'}; the run: {output}")


def tune_run(recipe: str, config: str, overrides: list[str]) -> None:
    """``tune run`` in a process of its own, as a user would type it."""
    command = [
        str(Path(sys.executable).with_name("tune")),
        "run",
        recipe,
        "--config",
        config,
        *overrides,
    ]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
