"""The data graph as a recipe composes it, over fake prompts, sampler and rewards."""

from __future__ import annotations

from typing import Any

from torchdata.nodes import BaseNode

from gspo.data import Advantage, Pack, Record, Sample, Score, Segment, prefetched
from tests.data.fakes import PARAMS, FakePool, FakeSampler, Items, prompt


def compose(
    num_prompts: int = 10,
    *,
    sampler: FakeSampler | None = None,
    params=PARAMS,
    group_size: int = 4,
    seed: int = 5,
    rank: int = 0,
    estimator="group_mean_std",
    refill_dead_groups: bool = False,
    splitter=None,
    write=None,
    tokens_per_microbatch: int = 64,
    bin_length: int | None = None,
    prefetch: int = 0,
    **packing: Any,
) -> BaseNode:
    """Microbatches of this many prompts; the keywords are those of the nodes."""
    node: BaseNode = Sample(
        Items(prompt, num_prompts),
        sampler or FakeSampler(),
        prompts_per_rollout=3,
        group_size=group_size,
        params=params,
        seed=seed,
        rank=rank,
        max_tokens=(bin_length or tokens_per_microbatch) + 1,
    )
    node = Score(node, FakePool())
    node = Advantage(node, estimator=estimator, refill_dead_groups=refill_dead_groups)
    if splitter is not None:
        node = Segment(node, splitter)
    if write is not None:
        node = Record(node, write, num_per_rollout=1)
    node = Pack(node, tokens_per_microbatch=tokens_per_microbatch, bin_length=bin_length, **packing)
    return prefetched(node, prefetch) if prefetch else node
