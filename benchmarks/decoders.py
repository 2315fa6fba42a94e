"""Measure an update of a pretrained model by transformers' decoder and by torchtune's, in turn.

    python benchmarks/decoders.py --model FOLDER --json OUT

FOLDER is SmolLM2-135M-Instruct as transformers saves it, in float32; both policies have its
weights. An update is the forward and backward of a packed rollout with the objective, the clipping
and the step of AdamW. Two rollouts behind shared prompts: 16 groups of 8 completions of 12 to 24
tokens, and 4 groups of 4 of 200 to 256. Medians over the rounds, and a profile of where the time
of a forward and backward goes.

Not here: other models, compiled layers, a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bins import CPU, tokens
from hardware import hardware
from torch.profiler import profile
from torchdata.nodes import IterableWrapper
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.training import FullModelHFCheckpointer

from gspo import parallel, update
from gspo.data import Pack
from gspo.losses import GSPOLoss
from gspo.models import huggingface
from gspo.policy import Microbatch, Policy, PolicyOptions, build_policy
from gspo.types import Completion, Group, GroupBatch, Prompt

MAX_SEQ_LEN = 2048
PROMPT_TOKENS = 35
SIZES = dict(
    vocab_size=49152,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    embed_dim=576,
    intermediate_dim=1536,
    rope_base=100_000,
    norm_eps=1e-5,
    scale_factor=1,
    max_seq_len=MAX_SEQ_LEN,
)
# Operations by what they are for; all others are summed up.
PARTS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}


@dataclass(frozen=True)
class Case:
    """A rollout."""

    num_prompts: int
    group_size: int
    shortest: int  # tokens of a completion
    longest: int

    def batches(self) -> list[Microbatch]:
        """Pack it."""
        draw = random.Random(0)
        groups = []
        for number in range(self.num_prompts):
            prompt = Prompt(f"p:{number}", "", tokens(draw, PROMPT_TOKENS))
            completions = [self._completion(draw) for _ in range(self.group_size)]
            groups.append(Group(number, prompt, completions))
        source = IterableWrapper([GroupBatch(groups)])
        node = Pack(source, tokens_per_microbatch=8192, max_seq_len=MAX_SEQ_LEN)
        return [Microbatch.prepare(batch, CPU) for batch in node]

    def _completion(self, draw: random.Random) -> Completion:
        num_tokens = draw.randint(self.shortest, self.longest)
        return Completion(
            tokens=tokens(draw, num_tokens),
            logps=[-8.0] * num_tokens,
            text="",
            finish_reason="length",
            temperature=1.0,
            advantage=draw.gauss(0, 1),
        )


CASES = {"short": Case(16, 8, 12, 24), "long": Case(4, 4, 200, 256)}


def build_policies(folder: str) -> dict[str, Policy]:
    """Return the same weights in both decoders."""
    with tempfile.TemporaryDirectory() as output_dir:
        of_torchtune = FullModelHFCheckpointer(
            checkpoint_dir=folder,
            checkpoint_files=["model.safetensors"],
            model_type="LLAMA3_2",
            output_dir=output_dir,
        )
        of_transformers = huggingface.Checkpointer(path=folder, output_dir=output_dir)
        with torch.device("meta"):
            decoders: dict[str, tuple[Any, Any]] = {
                "torchtune": (llama3_2(**SIZES), of_torchtune),
                "transformers": (
                    huggingface.causal_lm(folder, max_seq_len=MAX_SEQ_LEN),
                    of_transformers,
                ),
            }
        policies = {}
        for name, (decoder, checkpointer) in decoders.items():
            policies[name] = build_policy(
                decoder,
                checkpointer.load_checkpoint()["model"],
                GSPOLoss(),
                ranks=parallel.Ranks.of(CPU),
                device=CPU,
                options=PolicyOptions(),
            )
    return policies


def accumulate(policy: Policy, microbatches: list[Microbatch]) -> None:
    """Run the forward and backward."""
    num_documents = sum(len(microbatch.label_counts) for microbatch in microbatches)
    for _ in update.accumulate_gradients(policy, microbatches, float(num_documents)):
        pass


def seconds_of_parts(
    policy: Policy, microbatches: list[Microbatch], optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Make an update."""
    began = time.perf_counter()
    accumulate(policy, microbatches)
    computed = time.perf_counter()
    grad_norm = update.clip_gradients(policy, 1.0)
    update.step_if_finite(optimizer, grad_norm)
    ended = time.perf_counter()
    return {
        "update": ended - began,
        "gradients": computed - began,
        "optimizer": ended - computed,
        "grad_norm": grad_norm,
    }


def shares(policy: Policy, microbatches: list[Microbatch]) -> dict[str, float]:
    """Return the shares of a forward and backward by kind of operation."""
    with profile() as profiled:
        accumulate(policy, microbatches)
    policy.zero_grad(set_to_none=True)
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    spent = {}
    for part, names in PARTS.items():
        spent[part] = sum(event.self_cpu_time_total for event in events if event.key in names)
    spent["all else"] = total - sum(spent.values())
    return {part: microseconds / total for part, microseconds in spent.items()}


def measure(policies: dict[str, Policy], case: Case, rounds: int) -> dict[str, Any]:
    """Return the medians of both, after a round that is not counted."""
    microbatches = case.batches()
    # Without a change of the weights: every round has the same numbers.
    optimizers = {
        name: torch.optim.AdamW(policy.parameters(), lr=0.0, fused=True)
        for name, policy in policies.items()
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in policies}
    for _ in range(1 + rounds):
        for name, policy in policies.items():
            runs[name].append(seconds_of_parts(policy, microbatches, optimizers[name]))
    result: dict[str, Any] = {}
    for name, of_side in runs.items():
        counted = of_side[1:]
        result[name] = {key: statistics.median(run[key] for run in counted) for key in counted[0]}
        result[name]["shares"] = shares(policies[name], microbatches)
    result["ratio"] = result["transformers"]["update"] / result["torchtune"]["update"]
    result["slots"] = sum(microbatch.batch.tokens.numel() for microbatch in microbatches)
    return result


def product_rate() -> float:
    """Return the GFLOP/s of a large product in float32."""
    size = 4096
    left, right = torch.randn(2, size, size)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times) / 1e9


def main() -> None:
    """Measure both rollouts and print them."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the model's folder")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    parallel.init_process_group(CPU)
    policies = build_policies(args.model)
    result: dict[str, Any] = {"gflops_of_a_product": product_rate()}
    for name in args.cases:
        result[name] = measure(policies, CASES[name], args.rounds)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(hardware() | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
