"""The in-process sampler against Hugging Face ``generate``: the same weights, run by turns.

    python benchmarks/sampler.py [--json OUT] [--repeats 7]

A Qwen2 of 0.46 M parameters in float32, prompts of six tokens, no early stop, both in one process.
Hugging Face samples with its key/value cache and no log-probabilities; ours returns them, and
decodes the text. The shared row draws the same number of completions from an eighth of the prompts,
which ours prefills once each. Medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from hardware import hardware
from torch import Tensor
from torchtune.models.qwen2 import qwen2
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.modules import TransformerDecoder

from gspo.sampling.local import LocalSampler
from gspo.types import Prompt, SamplingParams

MODEL = dict(
    vocab_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=128,
    intermediate_dim=256,
    max_seq_len=512,
)
NORM_EPS = 1e-6
ROPE_BASE = 1_000_000.0
PROMPT_TOKENS = 6


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


SHAPES = [Shape(256, 1, 6), Shape(32, 8, 6), Shape(64, 1, 128), Shape(8, 8, 128)]


class Letters:
    """A tokenizer of one character per id."""

    eos_id = 0

    def get_vocab(self) -> dict[str, int]:
        """Return ids by character."""
        return {chr(48 + i): i for i in range(MODEL["vocab_size"])}

    def decode(self, tokens: list[int]) -> str:
        """Return one character per id."""
        return "".join(chr(48 + token) for token in tokens)


def build() -> tuple[TransformerDecoder, transformers.Qwen2ForCausalLM]:
    """Return the same random weights in both libraries, after a look that they agree."""
    torch.manual_seed(0)
    decoder = qwen2(**MODEL, norm_eps=NORM_EPS, rope_base=ROPE_BASE, tie_word_embeddings=False)
    reference = transformers.Qwen2ForCausalLM(reference_config()).eval()
    num_heads = (MODEL["num_heads"], MODEL["num_kv_heads"])
    weights = qwen2_tune_to_hf(decoder.state_dict(), *num_heads, MODEL["embed_dim"])
    reference.load_state_dict(weights)
    tokens = torch.randint(MODEL["vocab_size"], (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)
    return decoder, reference


def reference_config() -> transformers.Qwen2Config:
    """Return the model in Hugging Face's words."""
    return transformers.Qwen2Config(
        vocab_size=MODEL["vocab_size"],
        hidden_size=MODEL["embed_dim"],
        intermediate_size=MODEL["intermediate_dim"],
        num_hidden_layers=MODEL["num_layers"],
        num_attention_heads=MODEL["num_heads"],
        num_key_value_heads=MODEL["num_kv_heads"],
        max_position_embeddings=MODEL["max_seq_len"],
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=False,
    )


def ours(sampler: LocalSampler, tokens: Tensor, shape: Shape) -> Callable[[], object]:
    """Return a call that samples with this pack."""
    prompts = [Prompt(str(i), "", row) for i, row in enumerate(tokens.tolist())]
    params = SamplingParams(temperature=1.0, max_new_tokens=shape.new_tokens)

    def sample() -> object:
        return sampler.sample(
            prompts, group_size=shape.group_size, params=params, seeds=range(len(prompts))
        )

    return sample


def theirs(
    reference: transformers.Qwen2ForCausalLM, tokens: Tensor, shape: Shape
) -> Callable[[], object]:
    """Return a call that samples with Hugging Face."""
    rows = tokens.repeat_interleave(shape.group_size, 0)
    attention_mask = torch.ones_like(rows)

    def sample() -> object:
        return reference.generate(
            rows,
            attention_mask=attention_mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=shape.new_tokens,
            min_new_tokens=shape.new_tokens,
            pad_token_id=0,
        )

    return sample


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    sampler: LocalSampler,
    reference: transformers.Qwen2ForCausalLM,
    shape: Shape,
    repeats: int,
) -> dict[str, float]:
    """Return new tokens per second: medians, run by turns after a warm-up of each."""
    tokens = torch.randint(MODEL["vocab_size"], (shape.num_prompts, PROMPT_TOKENS))
    our_call = ours(sampler, tokens, shape)
    their_call = theirs(reference, tokens, shape)
    our_call()
    their_call()
    our_times = []
    their_times = []
    for _ in range(repeats):
        our_times.append(seconds(our_call))
        their_times.append(seconds(their_call))
    our_seconds = statistics.median(our_times)
    their_seconds = statistics.median(their_times)
    return {
        "prompts": shape.num_prompts,
        "group_size": shape.group_size,
        "new_tokens": shape.new_tokens,
        "local_tokens_per_s": shape.total_tokens / our_seconds,
        "hf_tokens_per_s": shape.total_tokens / their_seconds,
        "speedup": their_seconds / our_seconds,
    }


def table_line(row: dict[str, float]) -> str:
    """Return a row of figures as a line of text."""
    return (
        f"{row['prompts']:>8} {row['group_size']:>6} {row['new_tokens']:>5} "
        f"{row['local_tokens_per_s']:>12,.0f} {row['hf_tokens_per_s']:>10,.0f} "
        f"{row['speedup']:>8.2f}"
    )


def main() -> None:
    """Measure every shape, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    decoder, reference = build()
    sampler = LocalSampler(lambda: decoder, Letters(), stop_token_ids=[])
    where = hardware() | {"transformers": transformers.__version__}
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    titles = ("prompts", "group", "new", "local tok/s", "HF tok/s", "speedup")
    print("{:>8} {:>6} {:>5} {:>12} {:>10} {:>8}".format(*titles))
    rows = []
    for shape in SHAPES:
        row = measure(sampler, reference, shape, args.repeats)
        rows.append(row)
        print(table_line(row))
    if args.json:
        report = {"hardware": where, "model": MODEL, "results": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
