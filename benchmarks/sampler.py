"""The in-process sampler against Hugging Face ``generate``: the same weights, the same process, run by turns.

    python benchmarks/sampler.py [--json OUT] [--repeats 7]

A Qwen2 of 0.46 M parameters in float32, prompts of six tokens, no early stop. Hugging Face samples with its key/value
cache and no log-probabilities; ours returns them, and decodes the text. The shared row draws the same number of
completions from an eighth of the prompts, which ours prefills once each. Medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from hardware import hardware
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
NORM_EPS, ROPE_BASE, PROMPT_TOKENS = 1e-6, 1_000_000.0, 6
SHAPES = [(256, 1, 6), (32, 8, 6), (64, 1, 128), (8, 8, 128)]  # prompts, group size, new tokens


class Letters:
    """A tokenizer of one character per id."""

    eos_id = 0

    def get_vocab(self) -> dict[str, int]:
        """{character: id}."""
        return {chr(48 + i): i for i in range(MODEL["vocab_size"])}

    def decode(self, tokens: list[int]) -> str:
        """One character per id."""
        return "".join(chr(48 + token) for token in tokens)


def build() -> tuple[TransformerDecoder, transformers.Qwen2ForCausalLM]:
    """The same random weights in both libraries."""
    torch.manual_seed(0)
    decoder = qwen2(**MODEL, norm_eps=NORM_EPS, rope_base=ROPE_BASE, tie_word_embeddings=False)
    config = transformers.Qwen2Config(
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
    reference = transformers.Qwen2ForCausalLM(config).eval()
    heads = MODEL["num_heads"], MODEL["num_kv_heads"]
    reference.load_state_dict(qwen2_tune_to_hf(decoder.state_dict(), *heads, MODEL["embed_dim"]))
    tokens = torch.randint(MODEL["vocab_size"], (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)
    return decoder, reference


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    sampler: LocalSampler,
    reference: transformers.Qwen2ForCausalLM,
    shape: tuple[int, int, int],
    repeats: int,
) -> dict[str, float]:
    """Medians of new tokens per second, ours and Hugging Face's run by turns after a warm-up of each."""
    num_prompts, group_size, new_tokens = shape
    tokens = torch.randint(MODEL["vocab_size"], (num_prompts, PROMPT_TOKENS))
    prompts = [Prompt(str(i), "", row) for i, row in enumerate(tokens.tolist())]
    params = SamplingParams(temperature=1.0, max_new_tokens=new_tokens)
    rows = tokens.repeat_interleave(group_size, 0)
    options = dict(
        attention_mask=torch.ones_like(rows), do_sample=True, top_k=0, max_new_tokens=new_tokens
    )

    def ours() -> object:
        return sampler.sample(
            prompts, group_size=group_size, params=params, seeds=range(len(prompts))
        )

    def theirs() -> object:
        return reference.generate(rows, **options, min_new_tokens=new_tokens, pad_token_id=0)

    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    ours_s, theirs_s = (statistics.median(column) for column in zip(*times, strict=True))
    total = num_prompts * group_size * new_tokens
    return {
        "prompts": num_prompts,
        "group_size": group_size,
        "new_tokens": new_tokens,
        "local_tokens_per_s": total / ours_s,
        "hf_tokens_per_s": total / theirs_s,
        "speedup": theirs_s / ours_s,
    }


def main() -> None:
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
    print(
        f"{'prompts':>8} {'group':>6} {'new':>5} {'local tok/s':>12} {'HF tok/s':>10} {'speedup':>8}"
    )
    rows = []
    for shape in SHAPES:
        row = measure(sampler, reference, shape, args.repeats)
        rows.append(row)
        print(
            f"{row['prompts']:>8} {row['group_size']:>6} {row['new_tokens']:>5} {row['local_tokens_per_s']:>12,.0f} "
            f"{row['hf_tokens_per_s']:>10,.0f} {row['speedup']:>8.2f}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"hardware": where, "model": MODEL, "results": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
