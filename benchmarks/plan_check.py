"""Whether ``python -m gspo plan`` says what a run then holds: planned and measured memory of real ranks on a CPU.

    python benchmarks/plan_check.py --json benchmarks/results/DATE-plan_check.json

Each case starts its ranks with torchrun and gloo. A rank takes optimizer steps of the recipe's own parts and draws
completions; what is measured is its high-water mark of resident memory above that of the same process with everything
imported and compiled and nothing built. glibc is told to give freed memory back at once, as the plan has it.
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

import torch
import torch.distributed as dist
from hardware import hardware
from omegaconf import DictConfig
from torchtune import config

from gspo import parallel
from gspo.commands.validate import read_checked
from gspo.parallel.context import ContextAxis
from gspo.plan.estimate import DEFAULT_RATES, IN_SAMPLING, Layout, Machine, Planner
from gspo.policy.microbatch import Microbatch
from gspo.policy.model import Policy
from gspo.policy.sharding import load_weights, shard_policy
from gspo.sampling.local import LocalSampler
from gspo.types import Prompt, SamplingParams
from gspo.update import accumulate_gradients

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
]


def read(case: dict) -> DictConfig:
    """The config of a case."""
    model = [f"model.{key}={value}" for key, value in MODEL.items()]
    data_ranks = case["world_size"] // case.get("context_parallel_size", 1)
    settings = (
        SETTINGS | {"docs_per_step": 8 * data_ranks} | case
    )  # two microbatches of four documents
    rest = {key: value for key, value in settings.items() if key != "world_size"}
    return read_checked(["tiny/gspo", *model, *(f"{key}={value}" for key, value in rest.items())])


def planned(case: dict) -> dict[str, float]:
    """MiB of the training step's peak and of sampling's."""
    machine = Machine(memory=2**33, ranks_per_node=8, **DEFAULT_RATES["cpu"])
    memory = Planner(read(case), machine).plan(case["world_size"])["memory"]
    sums = {moment: sum(parts.values()) / MIB for moment, parts in memory["moments"].items()}
    sampling = sums.pop(IN_SAMPLING)
    worst = max(sums, key=sums.__getitem__)
    return {
        "training": sums[worst],
        "moment": worst,
        "sampling": sampling,
        "parts": memory["moments"][worst],
    }


def status(name: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def rest() -> float:
    """Gives back what is free; MiB that are resident then, from which the high-water mark starts anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


class Tokenizer:
    """What the sampler asks for."""

    stop_tokens, vocab_size = (0,), MODEL["vocab_size"]

    def decode(self, tokens: list[int]) -> str:  # noqa: D102
        return ""

    def get_vocab(self) -> dict[str, int]:  # noqa: D102
        return {"": 0}


def measured(case: dict) -> dict[str, float]:
    """MiB above the process at rest, of this rank: once to import and compile, once to measure."""
    cfg = read(case)
    layout = Layout.of(cfg, case["world_size"], None)
    parallel.init_process_group(CPU)
    run(cfg, layout, num_steps=1, max_new_tokens=2)
    at_rest = rest()
    found = run(cfg, layout, num_steps=2, max_new_tokens=cfg.sampling.max_new_tokens)
    return {name: high - at_rest for name, high in found.items()} | {"at_rest": at_rest}


def run(
    cfg: DictConfig, layout: Layout, *, num_steps: int, max_new_tokens: int
) -> dict[str, float]:
    """High-water marks in MiB of optimizer steps and of sampling after them."""
    mesh = parallel.build_mesh(
        CPU,
        data_parallel_replicate_size=cfg.data_parallel_replicate_size,
        context_parallel_size=cfg.context_parallel_size,
    )
    context, loss = ContextAxis.of(mesh), config.instantiate(cfg.loss)
    with torch.device("meta"):
        decoder = config.instantiate(cfg.model)
    policy = Policy(
        decoder, loss, chunk_size=cfg.head_chunk_size, kernel=cfg.kernel, context=context
    )
    shard_policy(
        policy,
        parallel.fsdp_mesh(mesh),
        activation_checkpointing=cfg.enable_activation_checkpointing,
    )
    replica = config.instantiate(cfg.model)
    load_weights(policy, replica.state_dict(), CPU)
    sampler = LocalSampler(replica, Tokenizer(), stop_token_ids=[], max_batch_size=512)
    optimizer = config.instantiate(cfg.optimizer, policy.parameters())
    batch = layout.microbatch
    batch.tokens.random_(1, MODEL["vocab_size"])
    batch.labels.random_(1, MODEL["vocab_size"])
    batch.old_logps.fill_(-math.log(MODEL["vocab_size"]))
    microbatches = [Microbatch.prepare(batch, CPU, context) for _ in range(layout.num_microbatches)]
    rest()
    for step in range(num_steps):
        options = {"reduce_every_microbatch": cfg.reduce_every_microbatch}
        for _ in accumulate_gradients(
            policy, microbatches if step else microbatches[:1], 1.0, **options
        ):
            pass
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sampler.update(policy, 0)
    marks = {"training": status("VmHWM")}
    rest()
    prompts = [
        Prompt(str(i), "", [1] * layout.prompt_tokens)
        for i in range(layout.rollout_documents // cfg.group_size)
    ]
    params = SamplingParams(max_new_tokens=max_new_tokens)
    sampler.sample(
        prompts, group_size=cfg.group_size, params=params, seeds=list(range(len(prompts)))
    )
    return marks | {"sampling": status("VmHWM")}


def launch(case: dict, folder: Path) -> list[dict[str, float]]:
    """What each rank of a case measured."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    arguments = [
        str(case["world_size"]),
        __file__,
        "--rank-of",
        json.dumps(case),
        "--json",
        str(folder),
    ]
    settings = {
        "MALLOC_MMAP_THRESHOLD_": str(MIB),
        "MALLOC_TRIM_THRESHOLD_": str(MIB),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([*program, *arguments], check=True, env=os.environ | settings)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(case["world_size"])]


def main() -> None:
    """Plans and measures every case, prints a table, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--only", type=int, nargs="+", help="cases by number")
    parser.add_argument("--rank-of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of is not None:
        found = measured(args.rank_of)
        (args.json / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
        dist.destroy_process_group()
        return
    rows = []
    for case in CASES if args.only is None else [CASES[i] for i in args.only]:
        plan = planned(case)
        with tempfile.TemporaryDirectory() as folder:
            ranks = launch(case, Path(folder))
        row = {"case": case, "moment": plan["moment"], "parts": plan["parts"]}
        for name in ("training", "sampling"):
            most = max(rank[name] for rank in ranks)
            row[name] = {
                "planned_mib": round(plan[name], 1),
                "measured_mib": round(most, 1),
                "ratio": plan[name] / most,
            }
            row[name]["of_ranks_mib"] = [round(rank[name], 1) for rank in ranks]
        rows.append(row)
        line = "   ".join(
            f"{name}: planned {row[name]['planned_mib']:7.1f} measured {row[name]['measured_mib']:7.1f} "
            f"({100 * (row[name]['ratio'] - 1):+.1f} %)"
            for name in ("training", "sampling")
        )
        print(f"{line}   {case}   {plan['moment']}", flush=True)
    if args.json:
        args.json.write_text(
            json.dumps(hardware() | {"model": MODEL, "settings": SETTINGS, "rows": rows}, indent=2)
            + "\n"
        )


if __name__ == "__main__":
    main()
