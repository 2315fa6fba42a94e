"""The in-process sampler on a real model against ``generate``: the same weights, run by turns.

    python benchmarks/sampler_real.py --model FOLDER [--json OUT] [--repeats 3]

FOLDER holds a Llama-like model with tied weights, such as SmolLM2-135M-Instruct, in the files of
transformers. Three samplers take it in float32 in one process: ``generate`` of transformers, ours
over torchtune's builder, and ours over the transformers model. ``generate`` returns no
log-probabilities, ours do. There is no early stop, and every prompt has as many tokens, since
padding costs ``generate`` more. It runs with both of its attention functions; the faster one
counts. The shared row draws the same number of completions of an eighth of the prompts, which
ours prefills once each. Medians over the repeats, whose order turns. Processor seconds of all
threads stand beside the wall's: where those are far from the wall's times the threads, other work
shared the cores, and ratios hold roughly.

The share of the draw is that of the seconds of decode steps, draw included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from hardware import hardware
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.modules import TransformerDecoder

from gspo.models.huggingface import causal_lm
from gspo.sampling import local
from gspo.sampling.local import LocalSampler
from gspo.types import Prompt, SamplingParams

PROMPT_TOKENS = 44  # of a sum of two numbers in a chat template
ATTENTIONS = ("sdpa", "eager")


@dataclass(frozen=True)
class Shape:
    """How much is sampled at once."""

    num_prompts: int
    group_size: int
    new_tokens: int

    @property
    def total_tokens(self) -> int:
        """Return the new tokens of all completions."""
        return self.num_prompts * self.group_size * self.new_tokens


SHAPES = {"plain": Shape(64, 1, 128), "shared": Shape(16, 8, 64)}


class Numbers:
    """A tokenizer that shows ids as numbers."""

    eos_id = 0

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return ids by number."""
        return {str(i): i for i in range(self._vocab_size)}

    def decode(self, tokens: list[int]) -> str:
        """Return the numbers."""
        return " ".join(str(token) for token in tokens)


class Stopwatch:
    """The seconds that a function has taken in all."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function and add its seconds."""
        start = time.perf_counter()
        result = self.function(*args, **options)
        self.seconds += time.perf_counter() - start
        return result


def torchtune_decoder(reference: Any) -> TransformerDecoder:
    """Return torchtune's decoder with the weights of a transformers model."""
    config = reference.config
    num_heads = config.num_attention_heads
    num_kv_heads = config.num_key_value_heads
    decoder = llama3_2(
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=config.hidden_size,
        intermediate_dim=config.intermediate_size,
        max_seq_len=1024,
        rope_base=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
        scale_factor=1,
    )
    state = reference.state_dict()
    weights = hf_to_tune(state, num_heads, num_kv_heads, config.hidden_size)
    weights.pop("output.weight", None)
    decoder.load_state_dict(weights)
    return decoder


def transformers_decoder(folder: Path, reference: Any) -> Any:
    """Return the pack's form of the transformers model with the same weights."""
    decoder = causal_lm(str(folder), max_seq_len=1024)
    decoder.load_state_dict(reference.state_dict())
    return decoder


def ours(sampler: LocalSampler, tokens: list[list[int]], shape: Shape) -> Callable[[], object]:
    """Return a call that samples with this pack."""
    prompts = [Prompt(str(i), "", row) for i, row in enumerate(tokens)]
    params = SamplingParams(temperature=1.0, max_new_tokens=shape.new_tokens)
    seeds = range(len(prompts))

    def sample() -> object:
        return sampler.sample(prompts, group_size=shape.group_size, params=params, seeds=seeds)

    return sample


def theirs(
    reference: Any, attention: str, tokens: list[list[int]], shape: Shape
) -> Callable[[], object]:
    """Return a call that samples with transformers."""
    rows = torch.tensor(tokens).repeat_interleave(shape.group_size, 0)
    mask = torch.ones_like(rows)

    def sample() -> object:
        reference.set_attn_implementation(attention)
        return reference.generate(
            rows,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=shape.new_tokens,
            min_new_tokens=shape.new_tokens,
            pad_token_id=0,
        )

    return sample


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of a call by the wall's clock and by the processors'."""
    start = time.perf_counter()
    processor_start = time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - processor_start


def draw_share(sampler: LocalSampler, call: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of a call's parts, and the draw's share of its decode steps."""
    decoder: Any = sampler._decoder
    draw = Stopwatch(local.draw_tokens)
    step = Stopwatch(decoder.step)
    prefill = Stopwatch(decoder.prefill)
    decoder.step = step
    decoder.prefill = prefill
    original = local.draw_tokens
    local.draw_tokens = draw
    try:
        call()
    finally:
        local.draw_tokens = original
        del decoder.step, decoder.prefill
    return {
        "prefill_s": prefill.seconds,
        "steps_s": step.seconds,
        "draw_s": draw.seconds,
        "draw_share": draw.seconds / (draw.seconds + step.seconds),
    }


def measure(
    samplers: dict[str, LocalSampler],
    reference: Any,
    shape: Shape,
    repeats: int,
    only: list[str],  # attention functions of ``generate``
) -> dict[str, Any]:
    """Return new tokens per second: medians, run by turns after a short warm-up of each."""
    vocab_size = reference.config.vocab_size
    attentions = [name for name in ATTENTIONS if name in only]
    generator = torch.Generator().manual_seed(0)
    size = (shape.num_prompts, PROMPT_TOKENS)
    tokens = torch.randint(3, vocab_size, size, generator=generator).tolist()
    calls = {}
    for attention in attentions:
        calls[f"generate, {attention}"] = theirs(reference, attention, tokens, shape)
    for name, sampler in samplers.items():
        calls[name] = ours(sampler, tokens, shape)
    times: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        names = list(calls)
        if repeat % 2:
            names.reverse()
        for name in names:
            wall, of_processors = seconds(calls[name])
            times[name].append(wall)
            processor[name].append(of_processors)
    medians = {name: statistics.median(all_of) for name, all_of in times.items()}
    generate = min(medians[f"generate, {attention}"] for attention in attentions)
    rows = []
    for name, median in medians.items():
        row: dict[str, Any] = {
            "sampler": name,
            "seconds": times[name],
            "processor_seconds": processor[name],
            "tokens_per_s": shape.total_tokens / median,
            "times_generate": generate / median,
        }
        if name in samplers:
            row |= draw_share(samplers[name], calls[name])
        rows.append(row)
    return {"shape": vars(shape), "rows": rows}


def print_table(name: str, result: dict[str, Any]) -> None:
    """Print a setting's rows."""
    shape = result["shape"]
    print(f"{name}: {shape}")
    for row in result["rows"]:
        share = f"{row['draw_share']:.1%}" if "draw_share" in row else ""
        print(
            f"  {row['sampler']:<20}{row['tokens_per_s']:>8,.0f} tokens/s"
            f"{row['times_generate']:>7.2f}  {share}",
            flush=True,
        )


def warm_up(samplers: dict[str, LocalSampler], reference: Any) -> None:
    """Let every side run once, shortly."""
    shape = Shape(2, 2, 2)
    tokens = [[5] * PROMPT_TOKENS, [6] * PROMPT_TOKENS]
    for attention in ATTENTIONS:
        theirs(reference, attention, tokens, shape)()
    for sampler in samplers.values():
        ours(sampler, tokens, shape)()


def main() -> None:
    """Measure both settings, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a folder of transformers")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS), help="of generate"
    )
    args = parser.parse_args()
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference = load(args.model, dtype=torch.float32).eval()
    tokenizer = Numbers(reference.config.vocab_size)
    tune = torchtune_decoder(reference)
    hugging_face = transformers_decoder(args.model, reference)
    samplers = {
        "torchtune": LocalSampler(lambda: tune, tokenizer, stop_token_ids=[]),
        "transformers": LocalSampler(lambda: hugging_face, tokenizer, stop_token_ids=[]),
    }
    where = hardware() | {"transformers": transformers.__version__}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    warm_up(samplers, reference)
    results = {}
    for name in args.only:
        shape = SHAPES[name]
        result = measure(samplers, reference, shape, args.repeats, args.attentions)
        result["load_averages"] = os.getloadavg()
        results[name] = result
        print_table(name, result)
    if args.json:
        report = {"hardware": where, "prompt_tokens": PROMPT_TOKENS, "results": results}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
