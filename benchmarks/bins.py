"""Measure what bins cost under a CPU's dense masks: by their length, and as the packer chooses.

    OMP_NUM_THREADS=1 python benchmarks/bins.py --model smollm2 --json OUT

Two tables, of a forward and a backward through the policy and the objective:

- ``lengths``: the same 2,048 slots of short documents in bins of each length. A line through the
  times, at one and at three layers, gives the length at which the mask costs as much as all else in
  the whole model, ``gspo.data.bins.EVEN_LENGTH``.
- ``layouts``: a rollout of 16 groups of 8 completions of 12 to 24 tokens behind prompts of 27, in
  bins as :class:`gspo.data.Pack` chooses them and of fixed lengths.

Times are of this process's processor, the best of several rounds in turn: on one thread another
process beside it hardly alters them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import hardware
from torchdata.nodes import IterableWrapper
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import TransformerDecoder

from gspo import parallel, update
from gspo.data import Pack
from gspo.data.layout import Document, build_batch
from gspo.losses import GSPOLoss
from gspo.policy import Microbatch, Policy, PolicyOptions, build_policy
from gspo.tiny import SHAPE
from gspo.types import Completion, Group, GroupBatch, PackedBatch, Prompt

NUM_SLOTS = 2048
LENGTHS = (64, 256, 512, 1024, 2048)
LAYERS = (1, 3)  # whose times are carried on to the whole model's
CPU = torch.device("cpu")
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "tiny": (qwen2, SHAPE),
    "smollm2": (
        llama3_2,
        dict(
            vocab_size=49152,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            embed_dim=576,
            intermediate_dim=1536,
        ),
    ),
}


def build_decoder(model: str, num_layers: int) -> TransformerDecoder:
    """Build a model of so many layers that takes long bins."""
    build, shape = MODELS[model]
    return build(**(shape | {"num_layers": num_layers, "max_seq_len": 4096}))


def random_policy(model: str, num_layers: int) -> Policy:
    """Build a policy with small random weights."""
    torch.manual_seed(0)
    weights = build_decoder(model, num_layers).state_dict()
    for name, tensor in weights.items():
        if tensor.dim() == 2:
            weights[name] = 0.02 * tensor
    with torch.device("meta"):
        decoder = build_decoder(model, num_layers)
    return build_policy(
        decoder,
        weights,
        GSPOLoss(),
        ranks=parallel.Ranks.of(CPU),
        device=CPU,
        options=PolicyOptions(),
    )


def tokens(draw: random.Random, num: int) -> list[int]:
    """Draw tokens that every model knows."""
    return [draw.randrange(1, 250) for _ in range(num)]


def equal_bins(length: int) -> PackedBatch:
    """Return documents of 8 slots in full bins of a length."""
    draw = random.Random(0)
    documents = [
        Document(
            tokens=tokens(draw, 9),
            num_prompt_tokens=1,
            logps=[-3.0] * 8,
            advantage=draw.gauss(0, 1),
            reward=0.0,
            temperature=1.0,
            policy_version=0,
            prompt_id=f"p:{number}",
            group_id=number,
        )
        for number in range(NUM_SLOTS // 8)
    ]
    per_bin = length // 8
    bin_of = [number // per_bin for number in range(len(documents))]
    return build_batch(documents, bin_of, length)


def rollout() -> GroupBatch:
    """Return 16 groups of 8 completions."""
    draw = random.Random(0)
    groups = []
    for number in range(16):
        prompt = Prompt(f"p:{number}", "", tokens(draw, 27))
        group = Group(number, prompt, [completion(draw) for _ in range(8)])
        groups.append(group)
    return GroupBatch(groups)


def completion(draw: random.Random) -> Completion:
    """Draw a completion of 12 to 24 tokens."""
    num_tokens = draw.randint(12, 24)
    return Completion(
        tokens=tokens(draw, num_tokens),
        logps=[-3.0] * num_tokens,
        text="",
        finish_reason="length",
        temperature=1.0,
        advantage=draw.gauss(0, 1),
    )


def packed_rollout(bin_length: int | None) -> PackedBatch:
    """Return the rollout in one microbatch, in bins that the packer chooses or of a length."""
    limit = 8192 if bin_length is None else bin_length * (8192 // bin_length)
    source = IterableWrapper([rollout()])
    (batch,) = Pack(source, tokens_per_microbatch=limit, bin_length=bin_length, max_seq_len=4096)
    return batch


def seconds(policy: Policy, microbatch: Microbatch) -> float:
    """Return the processor's seconds of one forward and backward."""
    batch = microbatch.batch
    began = time.process_time()
    denominator = update.denominator_of(policy, batch.num_documents, batch.num_label_tokens)
    for _ in update.accumulate_gradients(policy, [microbatch], denominator):
        pass
    ended = time.process_time()
    for parameter in policy.parameters():
        parameter.grad = None
    return ended - began


def best_seconds(policy: Policy, batches: list[PackedBatch], rounds: int) -> list[float]:
    """Return the best of some rounds over all batches, after one that is not counted."""
    microbatches = [Microbatch.prepare(batch, CPU) for batch in batches]
    times = []
    for _ in range(1 + rounds):
        times.append([seconds(policy, microbatch) for microbatch in microbatches])
    return np.array(times[1:]).min(0).tolist()


def measure_lengths(model: str, rounds: int) -> dict[str, Any]:
    """Time bins of each length at few layers, and carry the line through them on to all."""
    batches = [equal_bins(length) for length in LENGTHS]
    lines = []
    measured = {}
    for num_layers in LAYERS:
        best = best_seconds(random_policy(model, num_layers), batches, rounds)
        measured[f"{num_layers} layers"] = dict(zip(LENGTHS, best, strict=True))
        lines.append(np.polyfit(LENGTHS, best, 1))  # seconds a slot of length, seconds without
    first, last = lines
    few, many = LAYERS
    one_layer = (last - first) / (many - few)
    whole = last + one_layer * (MODELS[model][1]["num_layers"] - many)
    pairs, rest = whole
    return {"seconds": measured, "even_length": round(float(rest / pairs))}


def measure_layouts(model: str, rounds: int) -> list[dict[str, Any]]:
    """Time the rollout in bins as chosen and of fixed lengths."""
    cases = [None, 256, 512, 3072]
    batches = [packed_rollout(case) for case in cases]
    policy = random_policy(model, LAYERS[-1])
    times = best_seconds(policy, batches, rounds)
    rows = []
    for case, batch, best in zip(cases, batches, times, strict=True):
        rows.append(
            {
                "bin_length": case,
                "bins": batch.num_bins,
                "length": batch.bin_length,
                "slots": batch.tokens.numel(),
                "seconds": best,
            }
        )
    return rows


def main() -> None:
    """Run both tables and print them."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layouts-only", action="store_true", help="leave the first table out")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    parallel.init_process_group(CPU)
    result: dict[str, Any] = {"model": args.model}
    if not args.layouts_only:
        result["lengths"] = measure_lengths(args.model, args.rounds)
    result["layouts"] = measure_layouts(args.model, args.rounds)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(hardware() | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
