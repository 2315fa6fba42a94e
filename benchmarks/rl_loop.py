"""Measure how many completions a second the whole loop trains, and where the time goes.

    python benchmarks/rl_loop.py --json benchmarks/results/DATE-rl_loop.json [--trl]

The shape is fixed: a 0.46 M-parameter Qwen2 in fp32, 32 prompts of 6 tokens x 8 completions of 5
tokens a rollout, two updates of the whole rollout (``ppo_epochs`` 2), then a weight sync. The loop
is made of the package's own nodes and of the functions in ``gspo.update``, as the recipe's is. The
reward is a weighted coin, so that the share of dead groups is known: where they are not dropped,
every one of the 256 completions goes through both updates. ``--trl`` runs TRL's trainer on the same
shape as well (``rl_loop_trl.py``; it needs ``pip install 'gspo[bench]'``).

Not here: logs, evaluation, the audit of the weights, more than one rank.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hardware import hardware
from torch import Tensor
from torchdata.nodes import BaseNode
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from gspo import parallel, update
from gspo.data import Advantage, FetchSteps, Pack, Sample, Score, StepBatches
from gspo.losses import GSPOLoss
from gspo.metrics import StepMetrics, batch_metrics
from gspo.policy import Microbatch, Policy, PolicyOptions, build_policy
from gspo.rewards.pool import RewardPool
from gspo.sampling.local import LocalSampler
from gspo.types import Prompt, SamplingParams

NUM_PROMPTS, GROUP_SIZE, PROMPT_TOKENS, ANSWER_TOKENS, UPDATES = 32, 8, 6, 5, 2
WARMUP = 5  # rollouts
PARTS = ("total", "rollout", "update", "sync", "sample", "score", "processor")
SHAPE: dict[str, Any] = dict(
    vocab_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=128,
    intermediate_dim=256,
    max_seq_len=64,
    tie_word_embeddings=True,
)
CPU = torch.device("cpu")
ALPHABET = "".join(chr(48 + i) for i in range(SHAPE["vocab_size"]))


class CharTokenizer:
    """A tokenizer of one character a token without a stop token: every answer has five tokens."""

    stop_tokens: tuple[int, ...] = ()
    special_tokens: dict[str, int] = {}

    def get_vocab(self) -> dict[str, int]:
        """Return the ids by character."""
        return {character: i for i, character in enumerate(ALPHABET)}

    def encode(self, text: str, **_: Any) -> list[int]:
        """Return the ids of the characters."""
        return [ord(character) - 48 for character in text]

    def decode(self, ids: list[int], **_: Any) -> str:
        """Return the characters of the ids."""
        return "".join(ALPHABET[i] for i in ids)


@dataclass(frozen=True)
class Work:
    """The work of a loop between two updates of the sampler, and how long a document can be."""

    num_prompts: int
    group_size: int
    new_tokens: int
    updates: int
    max_seq_len: int
    learning_rate: float

    @property
    def num_completions(self) -> int:
        """The completions of a rollout."""
        return self.num_prompts * self.group_size


TINY = Work(NUM_PROMPTS, GROUP_SIZE, ANSWER_TOKENS, UPDATES, SHAPE["max_seq_len"], 1e-6)


class Prompts(BaseNode[Prompt]):
    """A node of endless random prompts."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)
        self._count = 0

    def next(self) -> Prompt:
        """Return the next prompt."""
        vocab_size = SHAPE["vocab_size"]
        ids = torch.randint(0, vocab_size, (PROMPT_TOKENS,), generator=self._generator)
        tokens = ids.tolist()
        self._count += 1
        return Prompt(f"p:{self._count}", CharTokenizer().decode(tokens), tokens)


def build_decoder() -> TransformerDecoder:
    """Build the model of the fixed shape."""
    return qwen2(**SHAPE)


def start_weights() -> dict[str, Tensor]:
    """Return random weights that give nearly uniform answers."""
    torch.manual_seed(0)
    weights = build_decoder().state_dict()
    for name, tensor in weights.items():
        if tensor.dim() == 2:
            weights[name] = 0.5 * tensor
    weights["tok_embeddings.weight"] = 0.02 * weights["tok_embeddings.weight"]
    return weights


class Loop:
    """Rollouts and updates, of the objects and in the order of the recipe."""

    def __init__(
        self,
        work: Work,
        policy: Policy,
        sampler: LocalSampler,
        prompts: BaseNode[Prompt],
        pool: RewardPool,
        *,
        drop_dead_groups: bool,
    ) -> None:
        self.work = work
        self.policy = policy
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=work.learning_rate, fused=True)
        self.sampler = sampler
        self.sampler.update(self.policy, 0)
        node: BaseNode[Any] = Sample(
            prompts,
            sampler,
            prompts_per_rollout=work.num_prompts,
            group_size=work.group_size,
            params=SamplingParams(max_new_tokens=work.new_tokens),
            seed=0,
            rank=0,
        )
        node = Score(node, pool)
        node = Advantage(node, drop_dead_groups=drop_dead_groups)
        node = Pack(node, tokens_per_microbatch=8192, max_seq_len=work.max_seq_len)
        self.steps = FetchSteps(node, docs_per_step=work.num_completions)
        self.step = 0

    def run(self) -> dict[str, float]:
        """Make one rollout and its two updates, and return the seconds of each part."""
        processor_began = time.process_time()
        began = time.perf_counter()
        step = next(self.steps)
        microbatches = [Microbatch.prepare(batch, CPU) for batch in step.batches]
        drawn = time.perf_counter()
        for _ in range(self.work.updates):
            self.update(microbatches, step)
        updated = time.perf_counter()
        self.sampler.update(self.policy, self.step)
        synced = time.perf_counter()
        stats = StepMetrics(step.stats).reduce()
        return {
            "total": synced - began,
            "rollout": drawn - began,
            "update": updated - drawn,
            "sync": synced - updated,
            "processor": time.process_time() - processor_began,
            "sample": stats["time/sample"],
            "score": stats["time/score"],
            "live": count_live(step),
            "reward": stats["reward/mean"],
            "tokens": stats["length/mean"],
        }

    def update(self, microbatches: list[Microbatch], step: StepBatches) -> None:
        """Make one optimizer step, as the recipe does without its logs."""
        sums = StepMetrics()
        denominator = update.denominator_of(self.policy, step.num_documents, step.num_label_tokens)
        for output in update.accumulate_gradients(self.policy, microbatches, denominator):
            sums.add(output.metrics, output.not_finite)
        for batch in step.batches:
            sums.add(batch_metrics(batch, self.step))
        sums.reduce()
        grad_norm = update.clip_gradients(self.policy, 1.0)
        update.step_if_finite(self.optimizer, grad_norm)
        self.step += 1


def tiny_loop(pool: RewardPool, *, drop_dead_groups: bool, compiled: bool) -> Loop:
    """Build the loop of the fixed shape."""
    with torch.device("meta"):
        decoder = build_decoder()
    policy = build_policy(
        decoder,
        start_weights(),
        GSPOLoss(),
        ranks=parallel.Ranks.of(CPU),
        device=CPU,
        options=PolicyOptions(compile_layers=compiled),
    )
    sampler = LocalSampler(build_decoder, CharTokenizer(), stop_token_ids=[])
    return Loop(TINY, policy, sampler, Prompts(), pool, drop_dead_groups=drop_dead_groups)


def count_live(step: StepBatches) -> int:
    """Return the number of documents that are trained on."""
    return sum(int((batch.label_counts > 0).sum()) for batch in step.batches)


def coin(solve_rate: float) -> str:
    """Return the pattern of a rewarded answer: its first character decides."""
    return f"[{ALPHABET[0]}-{ALPHABET[round(solve_rate * len(ALPHABET)) - 1]}].*"


@dataclass(frozen=True)
class Case:
    """A loop to be measured."""

    name: str
    solve_rate: float
    drop_dead_groups: bool
    compiled: bool


def measure(case: Case, *, rollouts: int) -> dict[str, Any]:
    """Return the medians over ``rollouts`` after a warm-up."""
    pattern = coin(case.solve_rate)
    coin_reward = {"function": "gspo.rewards.regex_match", "pattern": pattern, "truncated": "score"}
    rewards = {"coin": coin_reward}
    pool = RewardPool(rewards, num_workers=1)
    pool.warm()
    loop = tiny_loop(pool, drop_dead_groups=case.drop_dead_groups, compiled=case.compiled)
    runs = [loop.run() for _ in range(WARMUP + rollouts)]
    pool.close()
    return summarize(case.name, runs[WARMUP:], TINY)


def measure_trl(name: str, *, compiled: bool, rollouts: int) -> dict[str, Any]:
    """Return the same of TRL's trainer, which must not find this process's process group."""
    import rl_loop_trl

    runs = rl_loop_trl.run(WARMUP + rollouts, compiled=compiled)
    return summarize(name, runs[WARMUP:], TINY)


def measure_trl_apart(name: str, *, compiled: bool, rollouts: int) -> dict[str, Any]:
    """Run :func:`measure_trl` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(measure_trl, name, compiled=compiled, rollouts=rollouts).result()


def summarize(name: str, runs: list[dict[str, float]], work: Work) -> dict[str, Any]:
    """Return the medians and the spread of the rate."""
    num_completions = work.num_completions
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    rates = sorted(num_completions / run["total"] for run in runs)
    tenth = len(rates) // 10
    return {
        "case": name,
        "completions_per_s": num_completions / median["total"],
        "p10": rates[tenth],
        "p90": rates[-1 - tenth],
        "trained_documents": median["live"],
        "ms": {key: 1000 * seconds for key, seconds in median.items() if key in PARTS},
    }


def print_row(row: dict[str, Any]) -> None:
    """Print two lines on a case."""
    split = ", ".join(f"{key} {ms:.1f}" for key, ms in row["ms"].items())
    rate = f"{row['completions_per_s']:7.0f} completions/s ({row['p10']:.0f} to {row['p90']:.0f})"
    print(f"{row['case']:44s} {rate}")
    print(f"{'':44s} {row['trained_documents']:.0f} documents in each update; ms: {split}")


def read_arguments() -> argparse.Namespace:
    """Return what the command line says."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--trl", action="store_true", help="run TRL's trainer too")
    return parser.parse_args()


def main() -> None:
    """Run the cases and print two lines on each."""
    args = read_arguments()
    where = hardware()
    if args.trl:
        where |= {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    parallel.init_process_group(CPU)
    rows = []
    for suffix, compiled in (("", False), (", layers compiled", True)):
        every = Case(f"every group trained{suffix}", 0.5, False, compiled)
        half = Case(f"half of them dead, dropped{suffix}", 0.92, True, compiled)
        rows += [measure(case, rollouts=args.rollouts) for case in (every, half)]
        if args.trl:
            name = f"TRL{suffix}"
            rows.append(measure_trl_apart(name, compiled=compiled, rollouts=args.rollouts))
    for row in rows:
        print_row(row)
    if args.json:
        args.json.write_text(json.dumps(where | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
