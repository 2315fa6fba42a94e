"""How many completions a second the whole loop trains, and where the time goes.

    python benchmarks/rl_loop.py --json benchmarks/results/DATE-rl_loop.json [--trl]

The shape is fixed: a 0.46 M-parameter Qwen2 in fp32, 32 prompts of 6 tokens x 8 completions of 5 tokens a rollout, two
updates of the whole rollout (``ppo_epochs`` 2), then a weight sync. It runs the recipe's own objects through the
recipe's own loop. The reward is a weighted coin, so that the share of dead groups is known: where they are not dropped,
every one of the 256 completions goes through both updates. ``--trl`` runs TRL's trainer on the same shape as well
(``rl_loop_trl.py``; it needs ``pip install 'gspo[bench]'``).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from hardware import hardware
from torchdata.nodes import BaseNode
from torchtune.models.qwen2 import qwen2

from gspo import metrics, parallel
from gspo.data.graph import GraphOptions, build_graph
from gspo.data.steps import FetchSteps, StepBatches
from gspo.losses import GSPOLoss
from gspo.policy.microbatch import Microbatch
from gspo.policy.model import Policy
from gspo.policy.sharding import load_weights, shard_policy
from gspo.rewards.pool import RewardPool
from gspo.sampling.local import LocalSampler
from gspo.types import Prompt, SamplingParams
from gspo.update import accumulate_gradients

NUM_PROMPTS, GROUP_SIZE, PROMPT_TOKENS, ANSWER_TOKENS, UPDATES = 32, 8, 6, 5, 2
WARMUP = 5  # rollouts
SHAPE = dict(
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
    """One character a token, no stop token: every answer has five tokens."""

    stop_tokens: tuple[int, ...] = ()
    special_tokens: dict[str, int] = {}

    def get_vocab(self) -> dict[str, int]:
        """Ids by character."""
        return {c: i for i, c in enumerate(ALPHABET)}

    def encode(self, text: str, **_) -> list[int]:
        """Ids of the characters."""
        return [ord(c) - 48 for c in text]

    def decode(self, ids: list[int], **_) -> str:
        """Characters of the ids."""
        return "".join(ALPHABET[i] for i in ids)


class Prompts(BaseNode[Prompt]):
    """Endless random prompts, as a torchdata node."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)
        self._count = 0

    def next(self) -> Prompt:
        """The next prompt."""
        tokens = torch.randint(
            0, SHAPE["vocab_size"], (PROMPT_TOKENS,), generator=self._generator
        ).tolist()
        self._count += 1
        return Prompt(f"p:{self._count}", CharTokenizer().decode(tokens), tokens)


class Loop:
    """The recipe's objects, wired as the recipe wires them."""

    def __init__(self, pool: RewardPool, *, drop_dead_groups: bool, compiled: bool) -> None:
        torch.manual_seed(0)
        weights = {
            k: 0.5 * v if v.dim() == 2 else v for k, v in qwen2(**SHAPE).state_dict().items()
        }
        weights["tok_embeddings.weight"] = 0.02 * weights["tok_embeddings.weight"]
        with torch.device("meta"):
            decoder = qwen2(**SHAPE)
        self.pool = pool
        self.policy = Policy(decoder, GSPOLoss())
        shard_policy(
            self.policy, parallel.fsdp_mesh(parallel.build_mesh(CPU)), compile_layers=compiled
        )
        load_weights(self.policy, weights, CPU)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=True)
        self.sampler = LocalSampler(qwen2(**SHAPE), CharTokenizer(), stop_token_ids=[])
        self.sampler.update(self.policy, 0)
        batches = build_graph(
            Prompts(),
            sampler=self.sampler,
            pool=pool,
            options=GraphOptions(
                prompts_per_rollout=NUM_PROMPTS,
                group_size=GROUP_SIZE,
                params=SamplingParams(max_new_tokens=ANSWER_TOKENS),
                seed=0,
                tokens_per_microbatch=8192,
                drop_dead_groups=drop_dead_groups,
            ),
            rank=0,
        )
        self.steps = FetchSteps(batches, docs_per_step=NUM_PROMPTS * GROUP_SIZE, device=CPU)
        self.step = 0

    def run(self) -> dict[str, float]:
        """One rollout and its two updates; seconds by part."""
        times = {"total": -time.perf_counter(), "rollout": -time.perf_counter()}
        step = next(self.steps)
        microbatches = [Microbatch.prepare(batch, CPU) for batch in step.batches]
        times["rollout"] += time.perf_counter()
        times["update"] = -time.perf_counter()
        for _ in range(UPDATES):
            self.update(microbatches, step)
        times["update"] += time.perf_counter()
        times["sync"] = -time.perf_counter()
        self.sampler.update(self.policy, self.step)
        times["sync"] += time.perf_counter()
        times["total"] += time.perf_counter()
        stats = step.batches[0].stats
        live = sum(int((batch.label_counts > 0).sum()) for batch in step.batches)
        return times | {
            "sample": stats["time/sample"][0],
            "score": stats["time/score"][0],
            "live": live,
        }

    def update(self, microbatches: list[Microbatch], step: StepBatches) -> None:
        """What the recipe does for one optimizer step, logging excepted."""
        sums = metrics.StepMetrics(reward.name for reward in self.pool.rewards)
        denominator = self.policy.loss.denominator(step.num_documents, step.num_label_tokens)
        for pairs in accumulate_gradients(self.policy, microbatches, denominator):
            sums.add(pairs)
        for microbatch in microbatches:
            sums.add(metrics.batch_pairs(microbatch.batch, self.step))
        sums.reduce(CPU)
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1


def coin(solve_rate: float) -> str:
    """The pattern of a rewarded answer: its first character decides."""
    return f"[{ALPHABET[0]}-{ALPHABET[round(solve_rate * len(ALPHABET)) - 1]}].*"


def measure(
    name: str, *, solve_rate: float, drop_dead_groups: bool, compiled: bool, rollouts: int
) -> dict:
    """Medians over ``rollouts`` after a warm-up."""
    spec = {"coin": {"function": "gspo.rewards.regex_match", "pattern": coin(solve_rate)}}
    pool = RewardPool(spec, num_workers=1)
    pool.warm()
    loop = Loop(pool, drop_dead_groups=drop_dead_groups, compiled=compiled)
    runs = [loop.run() for _ in range(WARMUP + rollouts)]
    pool.close()
    return summarize(name, runs[WARMUP:])


def measure_trl(name: str, *, compiled: bool, rollouts: int) -> dict:
    """The same by TRL's trainer; in a process of its own, where there is no process group for it to use."""
    import rl_loop_trl

    return summarize(name, rl_loop_trl.run(WARMUP + rollouts, compiled=compiled)[WARMUP:])


def summarize(name: str, runs: list[dict[str, float]]) -> dict:
    """Medians and the spread of the rate."""
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    rate = NUM_PROMPTS * GROUP_SIZE / median["total"]
    totals = sorted(NUM_PROMPTS * GROUP_SIZE / run["total"] for run in runs)
    return {
        "case": name,
        "completions_per_s": rate,
        "p10": totals[len(totals) // 10],
        "p90": totals[-1 - len(totals) // 10],
        "trained_documents": median["live"],
        "ms": {k: 1000 * v for k, v in median.items() if k != "live"},
    }


def main() -> None:
    """Runs the cases and prints one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--trl", action="store_true", help="run TRL's trainer too")
    args = parser.parse_args()
    where = hardware()
    if args.trl:
        where |= {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    parallel.init_process_group(CPU)
    rows = []
    for suffix, compiled in (("", False), (", layers compiled", True)):
        options = {"compiled": compiled, "rollouts": args.rollouts}
        rows.append(
            measure(
                f"every group trained{suffix}", solve_rate=0.5, drop_dead_groups=False, **options
            )
        )
        rows.append(
            measure(
                f"half of them dead, dropped{suffix}",
                solve_rate=0.92,
                drop_dead_groups=True,
                **options,
            )
        )
        if args.trl:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(pool.submit(measure_trl, f"TRL{suffix}", **options).result())
    for row in rows:
        split = ", ".join(f"{k} {v:.1f}" for k, v in row["ms"].items())
        print(
            f"{row['case']:44s} {row['completions_per_s']:7.0f} completions/s ({row['p10']:.0f} to {row['p90']:.0f})"
        )
        print(f"{'':44s} {row['trained_documents']:.0f} documents in each update; ms: {split}")
    if args.json:
        args.json.write_text(json.dumps(where | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
