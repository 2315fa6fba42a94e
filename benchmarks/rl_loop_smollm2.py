"""Measure the whole loop on a pretrained model beside TRL's ``GRPOTrainer``, a rollout in turn.

    python benchmarks/rl_loop_smollm2.py --model FOLDER --json OUT

FOLDER is SmolLM2-135M-Instruct as transformers saves it, in float32. Both sides get the same
two-digit sums, rendered by the model's chat template, and the same strict reward: the last number
of a finished completion is the sum. Both have 16 prompts x 8 completions of up to 24 tokens a
rollout, one update of all of them, AdamW and GSPO's objective. Each side keeps a process of its
own, which waits while another works, so that a slow minute of the machine hits all of them. TRL's
settings are those of ``rl_loop_trl.py``.

Not here: evaluation, checkpoints, the audit of the weights, more than one rank.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from hardware import hardware
from rl_loop import CPU, Loop, Work, print_row, summarize
from torchdata.nodes import IterableWrapper

from gspo import parallel
from gspo.losses import GSPOLoss
from gspo.models import huggingface
from gspo.policy import PolicyOptions, build_policy
from gspo.rewards import RewardPool, math_verify
from gspo.sampling.local import LocalSampler
from gspo.types import Prompt

WORK = Work(16, 8, 24, updates=1, max_seq_len=2048, learning_rate=2e-5)
EXTRACTION = "last_number"
SIDES = ("every group trained", "dead groups dropped", "TRL")


@dataclass(frozen=True)
class Task:
    """The model's folder and what it is asked."""

    folder: str
    rollouts: int
    compiled: bool
    split: int  # the parts in which TRL makes an update

    def questions(self) -> list[tuple[list[dict[str, str]], str]]:
        """Return a chat and its answer for each prompt of all rollouts."""
        draw = random.Random(0)
        questions = []
        for _ in range(self.rollouts * WORK.num_prompts):
            first, second = draw.randint(10, 99), draw.randint(10, 99)
            text = f"What is {first} + {second}? Answer with just the number."
            chat = [{"role": "user", "content": text}]
            questions.append((chat, str(first + second)))
        return questions


def prompts(task: Task, tokenizer: Any) -> list[Prompt]:
    """Return the questions in this pack's form."""
    rendered = []
    for number, (chat, answer) in enumerate(task.questions()):
        text = tokenizer.render_chat(chat)
        tokens = tokenizer.encode(text, add_bos=False, add_eos=False)
        rendered.append(Prompt(f"p:{number}", text, tokens, answer))
    return rendered


def run_pack(turns: Connection, task: Task, *, drop_dead_groups: bool) -> None:
    """Make a rollout and its update at each turn."""
    parallel.init_process_group(CPU)
    tokenizer = huggingface.tokenizer(task.folder)
    build = partial(huggingface.causal_lm, task.folder, max_seq_len=WORK.max_seq_len)
    with torch.device("meta"):
        decoder = build()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = huggingface.Checkpointer(path=task.folder, output_dir=folder).load_checkpoint()
    policy = build_policy(
        decoder,
        checkpoint["model"],
        GSPOLoss(),
        ranks=parallel.Ranks.of(CPU),
        device=CPU,
        options=PolicyOptions(compile_layers=task.compiled),
    )
    reward = {"function": "gspo.rewards.math_verify", "extraction": EXTRACTION}
    pool = RewardPool({"sum": reward}, num_workers=1)
    pool.warm()
    loop = Loop(
        WORK,
        policy,
        LocalSampler(build, tokenizer),
        IterableWrapper(prompts(task, tokenizer)),
        pool,
        drop_dead_groups=drop_dead_groups,
    )
    for _ in range(task.rollouts):
        turns.recv()
        turns.send(loop.run())
    pool.close()


def run_trl(turns: Connection, task: Task) -> None:
    """Let TRL make a rollout and its update at each turn."""
    import rl_loop_trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOTrainer

    class Turns(rl_loop_trl.Clock):
        """A clock that stands still while it is another's turn."""

        def on_train_begin(self, *args, **kwargs) -> None:
            turns.recv()
            super().on_train_begin(*args, **kwargs)

        def on_step_end(self, *args, **kwargs) -> None:
            super().on_step_end(*args, **kwargs)
            turns.send(self.runs[-1] | drawn)
            if len(self.runs) < task.rollouts:
                turns.recv()
                super().on_train_begin()

    drawn: dict[str, float] = {"live": WORK.num_completions}

    def reward(prompts, completions, completion_ids, answer, **_) -> list[float]:
        """Return the same reward as the pack's pool."""
        rewards = []
        for prompt, completion, ids, reference in zip(
            prompts, completions, completion_ids, answer, strict=True
        ):
            is_finished = ids[-1] == tokenizer.eos_token_id
            metadata = {"finish_reason": "stop" if is_finished else "length"}
            texts = prompt[-1]["content"], completion[-1]["content"]
            rewards.append(math_verify(*texts, reference, metadata, extraction=EXTRACTION))
        drawn["reward"] = sum(rewards) / len(rewards)
        drawn["tokens"] = sum(len(ids) for ids in completion_ids) / len(rewards)
        return rewards

    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    model = AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32)
    if task.compiled:
        model.model.compile(dynamic=True)
    questions = task.questions()
    rows = [{"prompt": chat, "answer": answer} for chat, answer in questions]
    clock = Turns(WORK.updates)
    with tempfile.TemporaryDirectory() as folder:
        args = rl_loop_trl.settings(folder, task.rollouts, WORK, split=task.split)
        trainer = GRPOTrainer(
            model,
            reward,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        clock.watch(trainer)
        trainer.train()


def start(run: Callable[..., None], task: Task, **options: Any) -> Connection:
    """Start a side in a process of its own, and return the end at which turns are given."""
    context = get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, task)
    process = context.Process(target=run, args=arguments, kwargs=options, daemon=False)
    process.start()
    there.close()  # a side that dies is then the end of the file
    return here


def take_turn(side: Connection) -> dict[str, float]:
    """Let a side make a rollout and its update, and return its seconds by part."""
    side.send(True)
    return side.recv()


def summary(name: str, runs: list[dict[str, float]], warmup: int) -> dict[str, Any]:
    """Return a side's medians, and what it drew in each rollout."""
    row = summarize(name, runs[warmup:], WORK)
    for key in ("total", "processor", "reward", "tokens", "live"):
        row[f"{key}_by_rollout"] = [run[key] for run in runs]
    return row


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write the result, if it is asked for."""
    if path is None:
        return
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    report = hardware() | versions | {"rows": rows}
    path.write_text(json.dumps(report, indent=2) + "\n")


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the model's folder")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1, help="rollouts that are not counted")
    parser.add_argument("--compiled", action="store_true", help="compile the layers of all sides")
    parser.add_argument("--split", type=int, default=1, help="parts of an update of TRL's")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    return parser.parse_args()


def main() -> None:
    """Run the sides in turn and print two lines on each."""
    args = read_arguments()
    task = Task(str(args.model), args.rollouts, args.compiled, args.split)
    starts = {
        "every group trained": partial(start, run_pack, task, drop_dead_groups=False),
        "dead groups dropped": partial(start, run_pack, task, drop_dead_groups=True),
        "TRL": partial(start, run_trl, task),
    }
    sides = {name: starts[name]() for name in args.sides}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(args.rollouts):
        for name, side in sides.items():
            run = take_turn(side)
            runs[name].append(run)
            print(f"{number:3d} {name:22s} {run['total']:6.1f} s  reward {run['reward']:.3f}")
        if number >= args.warmup:
            rows = [summary(name, of_side, args.warmup) for name, of_side in runs.items()]
            write(args.json, rows)  # each time: a long run that is ended has its results
    for row in rows:
        print_row(row)


if __name__ == "__main__":
    main()
