"""Compare planned with measured memory of real ranks on a CPU: is ``python -m gspo plan`` right?

    python benchmarks/plan_check.py --json benchmarks/results/DATE-plan_check.json

Each case starts its ranks with torchrun and gloo. A rank takes optimizer steps of the recipe's own
parts and draws completions. What is measured is its high-water mark of resident memory above that
of the same process with everything imported and compiled and nothing built. glibc is told to give
freed memory back at once, as the plan has it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hardware import hardware
from torch.optim import Optimizer

from gspo import parallel
from gspo.adapters import build_replica
from gspo.commands.validate import read_checked
from gspo.config import Settings, build
from gspo.parallel import Ranks
from gspo.plan.estimate import IN_SAMPLING, Planner
from gspo.plan.layout import Layout
from gspo.plan.machine import DEFAULT_RATES, Machine
from gspo.policy import Microbatch, Policy, PolicyOptions, build_policy
from gspo.sampling.local import LocalSampler
from gspo.types import Prompt, SamplingParams
from gspo.update import accumulate_gradients, clip_gradients, step_if_finite

CPU = torch.device("cpu")
MIB = 2**20
MODEL = {
    "_component_": "torchtune.models.qwen2.qwen2",
    "vocab_size": 16_000,
    "num_layers": 6,
    "num_heads": 8,
    "num_kv_heads": 2,
    "embed_dim": 512,
    "intermediate_dim": 2048,
    "max_seq_len": 1024,
    "tie_word_embeddings": False,
}
SETTINGS = {
    "loss.clip_low": 0.99,  # every token has a coefficient
    "loss.clip_high": 1e6,
    "sampling.max_new_tokens": 192,
    "prompts_per_rollout": 16,
    "group_size": 4,
    "packing.tokens_per_microbatch": 1024,
    "packing.bin_length": 512,
    "head_chunk_size": 256,
    "optimizer.fused": False,
    "reward_pool.num_workers": 1,
}
LORA = {
    "model._component_": "torchtune.models.qwen2.lora_qwen2",
    "model.lora_attn_modules": "[q_proj, k_proj, v_proj, output_proj]",
    "model.apply_lora_to_mlp": True,
    "model.lora_rank": 16,
    "model.lora_alpha": 32,
}
QLORA = LORA | {"model.quantize_base": True}
CASES = [
    {"world_size": 1},
    {"world_size": 1, "enable_activation_checkpointing": True},
    {"world_size": 1, "kernel": "reference"},
    {"world_size": 2},
    {"world_size": 2, "enable_activation_checkpointing": True, "reduce_every_microbatch": False},
    {"world_size": 2, "context_parallel_size": 2},
    {"world_size": 2, "context_parallel_size": 2, "enable_activation_checkpointing": True},
    {"world_size": 4},
    {"world_size": 4, "enable_activation_checkpointing": True},
    {"world_size": 4, "context_parallel_size": 2},
    {"world_size": 4, "context_parallel_size": 2, "enable_activation_checkpointing": True},
    {"world_size": 4, "data_parallel_replicate_size": 2, "enable_activation_checkpointing": True},
    {"world_size": 1, **LORA},
    {"world_size": 1, **LORA, "enable_activation_checkpointing": True},
    {"world_size": 2, **LORA},
    {"world_size": 1, **QLORA},
    {"world_size": 1, **QLORA, "enable_activation_checkpointing": True},
    {"world_size": 2, **QLORA},
]


def read(case: dict[str, Any]) -> Settings:
    """Return the settings of a case."""
    data_ranks = case["world_size"] // case.get("context_parallel_size", 1)
    # Two microbatches of four documents.
    settings = SETTINGS | {"docs_per_step": 8 * data_ranks} | case
    del settings["world_size"]
    overrides = [f"model.{key}={value}" for key, value in MODEL.items()]
    overrides += [f"{key}={value}" for key, value in settings.items()]
    return read_checked(["tiny/gspo", *overrides])


def planned(case: dict[str, Any]) -> dict[str, Any]:
    """Return MiB of the training step's peak and of sampling's."""
    machine = Machine(memory=2**33, ranks_per_node=8, **DEFAULT_RATES["cpu"])
    moments = Planner(read(case), machine).plan(case["world_size"])["memory"]["moments"]
    sums = {moment: sum(parts.values()) / MIB for moment, parts in moments.items()}
    sampling = sums.pop(IN_SAMPLING)
    worst = max(sums, key=sums.__getitem__)
    return {
        "training": sums[worst],
        "moment": worst,
        "sampling": sampling,
        "parts": moments[worst],
    }


def status(name: str) -> float:
    """Return a line of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def rest() -> float:
    """Give back what is free, and start the high-water mark anew from there; return it in MiB."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


class Tokenizer:
    """The part of a tokenizer that the sampler uses."""

    stop_tokens = (0,)
    vocab_size = MODEL["vocab_size"]

    def decode(self, tokens: list[int]) -> str:  # noqa: D102
        return ""

    def get_vocab(self) -> dict[str, int]:  # noqa: D102
        return {"": 0}


def measured(case: dict[str, Any]) -> dict[str, float]:
    """Return MiB of this rank above the process at rest.

    It runs once to import and compile, and once to measure.
    """
    cfg = read(case)
    layout = Layout.of(cfg, case["world_size"], None)
    parallel.init_process_group(CPU)
    run(cfg, layout, num_steps=1, max_new_tokens=2)
    at_rest = rest()
    marks = run(cfg, layout, num_steps=2, max_new_tokens=cfg.sampling.max_new_tokens)
    above = {name: mark - at_rest for name, mark in marks.items()}
    return above | {"at_rest": at_rest}


def run(cfg: Settings, layout: Layout, *, num_steps: int, max_new_tokens: int) -> dict[str, float]:
    """Return high-water marks in MiB of optimizer steps and of sampling after them."""
    ranks = Ranks.of(
        CPU, replicate=cfg.data_parallel_replicate_size, context=cfg.context_parallel_size
    )
    replica = build_replica(lambda: build(cfg, "model"), CPU)
    for parameter in replica.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    policy = make_policy(cfg, ranks, replica.state_dict())
    sampler = LocalSampler(lambda: replica, Tokenizer(), stop_token_ids=[], max_batch_size=512)
    optimizer = build(cfg, "optimizer", policy.trained_parameters())
    microbatches = make_microbatches(layout, ranks)
    rest()
    for step in range(num_steps):
        train(policy, optimizer, microbatches if step else microbatches[:1], cfg)
        sampler.update(policy, 0)
    marks = {"training": status("VmHWM")}
    rest()
    num_prompts = layout.rollout_documents // cfg.group_size
    prompts = [Prompt(str(i), "", [1] * layout.prompt_tokens) for i in range(num_prompts)]
    params = SamplingParams(max_new_tokens=max_new_tokens)
    seeds = list(range(num_prompts))
    sampler.sample(prompts, group_size=cfg.group_size, params=params, seeds=seeds)
    return marks | {"sampling": status("VmHWM")}


def make_policy(cfg: Settings, ranks: Ranks, weights: dict[str, torch.Tensor]) -> Policy:
    """Build the policy of a run."""
    with torch.device("meta"):
        decoder = build(cfg, "model")
    options = PolicyOptions(
        kernel=cfg.kernel,
        head_chunk_size=cfg.head_chunk_size,
        activation_checkpointing=cfg.enable_activation_checkpointing,
    )
    loss = build(cfg, "loss")
    return build_policy(decoder, weights, loss, ranks=ranks, device=CPU, options=options)


def make_microbatches(layout: Layout, ranks: Ranks) -> list[Microbatch]:
    """Fill the plan's microbatch with random tokens, as often as a step has it."""
    batch = layout.microbatch
    batch.tokens.random_(1, MODEL["vocab_size"])
    batch.labels.random_(1, MODEL["vocab_size"])
    batch.old_logps.fill_(-math.log(MODEL["vocab_size"]))
    count = layout.num_microbatches
    return [Microbatch.prepare(batch, CPU, ranks.context) for _ in range(count)]


def train(
    policy: Policy, optimizer: Optimizer, microbatches: list[Microbatch], cfg: Settings
) -> None:
    """Take an optimizer step."""
    backwards = accumulate_gradients(
        policy, microbatches, 1.0, reduce_every_microbatch=cfg.reduce_every_microbatch
    )
    for _ in backwards:
        pass
    step_if_finite(optimizer, clip_gradients(policy, 1.0))


def launch(case: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    """Start the ranks of a case, and return what each has measured."""
    num_ranks = case["world_size"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    arguments = [__file__, "--rank-of", json.dumps(case), "--json", str(folder)]
    settings = {
        "MALLOC_MMAP_THRESHOLD_": str(MIB),
        "MALLOC_TRIM_THRESHOLD_": str(MIB),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *launcher, *arguments]
    subprocess.run(command, check=True, env=os.environ | settings)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Plan and measure a case."""
    plan = planned(case)
    with tempfile.TemporaryDirectory() as folder:
        ranks = launch(case, Path(folder))
    row: dict[str, Any] = {"case": case, "moment": plan["moment"], "parts": plan["parts"]}
    for name in ("training", "sampling"):
        of_ranks = [rank[name] for rank in ranks]
        row[name] = {
            "planned_mib": round(plan[name], 1),
            "measured_mib": round(max(of_ranks), 1),
            "ratio": plan[name] / max(of_ranks),
            "of_ranks_mib": [round(mib, 1) for mib in of_ranks],
        }
    return row


def in_words(row: dict[str, Any]) -> str:
    """Return a line for people."""
    words = []
    for name in ("training", "sampling"):
        of_name = row[name]
        words.append(
            f"{name}: planned {of_name['planned_mib']:7.1f} measured "
            f"{of_name['measured_mib']:7.1f} ({100 * (of_name['ratio'] - 1):+.1f} %)"
        )
    return "   ".join([*words, str(row["case"]), row["moment"]])


def main() -> None:
    """Plan and measure every case, print a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", type=int, nargs="+", help="cases by number")
    parser.add_argument("--rank-of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of is not None:
        marks = measured(args.rank_of)
        (args.json / f"{os.environ['RANK']}.json").write_text(json.dumps(marks))
        dist.destroy_process_group()
        return
    rows = []
    for case in CASES if args.only is None else [CASES[i] for i in args.only]:
        rows.append(compare(case))
        print(in_words(rows[-1]), flush=True)
    if args.json:
        written = hardware() | {"model": MODEL, "settings": SETTINGS, "rows": rows}
        args.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
