"""The sizes of a visit to a GPU, and those of its rehearsal."""

from __future__ import annotations

from dataclasses import dataclass

CONFIG = "deepseek_r1_distill_qwen_1_5b/gspo_math"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    # The loss head: rows, hidden size, vocabulary, and a prime one, whose rows lie unaligned.
    num_rows: int
    hidden_size: int
    vocab_size: int
    prime_vocab_size: int
    num_same_runs: int  # of the gradient in place, which are compared bit by bit
    bits_rows: int  # rows of these
    head_shapes: tuple[tuple[int, int, int], tuple[int, int, int]]  # T, H, V
    head_rounds: int
    head_providers: tuple[str, ...] = ()  # words of their names; none for all that are installed
    # Square products and a copied tensor, for the rates that are reached.
    product_size: int
    copied_bytes: int
    # One token's attention over the cache.
    decode_rows: int
    num_kv_heads: int
    queries_per_kv_head: int
    head_dim: int
    num_lengths: int
    block_columns: int
    # Beyond the config: key=value for the command line.
    overrides: tuple[str, ...] = ()
    switch_tokens: int  # decode steps of a switch's two sides
    mismatch_tokens: int
    short_documents: int  # of a short optimizer step
    profiled_columns: tuple[int, int]  # at the end of a profiled decode
    profiled_steps: int
    tests: tuple[str, ...]  # arguments of pytest


REAL = Sizes(
    num_rows=4096,
    hidden_size=1536,
    vocab_size=151_936,
    prime_vocab_size=151_909,
    num_same_runs=200,
    bits_rows=1024,
    head_shapes=((8192, 1536, 151_936), (8192, 3584, 152_064)),
    head_rounds=5,
    product_size=8192,
    copied_bytes=2**33,
    decode_rows=256,
    num_kv_heads=2,
    queries_per_kv_head=6,
    head_dim=128,
    num_lengths=20,
    block_columns=256,
    switch_tokens=256,
    mismatch_tokens=256,
    short_documents=16,
    profiled_columns=(256, 3000),
    profiled_steps=64,
    tests=("-m", "gpu", "--continue-on-collection-errors"),
)

TINY = Sizes(
    num_rows=256,
    hidden_size=16,
    vocab_size=512,
    prime_vocab_size=509,
    num_same_runs=2,
    bits_rows=3,
    head_shapes=((256, 16, 512), (256, 32, 512)),
    head_rounds=1,
    head_providers=("gspo linear", "eager"),  # none that is compiled
    product_size=64,
    copied_bytes=2**16,
    decode_rows=4,
    num_kv_heads=2,
    queries_per_kv_head=2,
    head_dim=16,
    num_lengths=2,
    block_columns=16,
    overrides=(
        "device=cpu",
        "dtype=fp32",  # torchtune takes bf16 on some processors only
        "model.vocab_size=512",
        "model.num_layers=2",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "model.embed_dim=64",
        "model.intermediate_dim=64",
        "model.max_seq_len=256",
        "prompts.max_prompt_tokens=16",
        "sampling.max_new_tokens=32",
        "packing.tokens_per_microbatch=256",
        "packing.bin_length=256",
        "prompts_per_rollout=2",
        "group_size=4",
        "docs_per_step=8",
        "sampler.max_batch_size=8",
        "head_chunk_size=64",
    ),
    switch_tokens=4,
    mismatch_tokens=8,
    short_documents=8,
    profiled_columns=(24, 64),
    profiled_steps=4,
    tests=("--noconftest", "tests/test_advantages.py"),
)
