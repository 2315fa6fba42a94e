"""The data graph, from prompts to microbatches: reader, sample, score, advantage, segment, pack, prefetch.

One torchdata.nodes graph, stateful end to end: ``state_dict()`` between two microbatches and ``reset(state)`` on a
graph built alike give the same microbatches as going on, as long as the sampler holds the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchdata.nodes import BaseNode

from gspo.advantages import Estimator, check_group_size
from gspo.data.advantage import Advantage, log_quarantine
from gspo.data.pack import Pack
from gspo.data.prefetch import prefetched
from gspo.data.sample import Sample
from gspo.data.score import Score
from gspo.data.segments import Segment, Splitter
from gspo.errors import InputError
from gspo.rewards.pool import RewardPool
from gspo.sampling import Sampler
from gspo.types import PackedBatch, Prompt, Rollout, SamplingParams


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """What the nodes between the reader and the trainer are asked to do; each field is the node argument of that name.

    ``prefetch`` is how many microbatches may be made ahead, on a thread of their own; 0 makes each when asked for.
    """

    prompts_per_rollout: int
    group_size: int
    params: SamplingParams
    seed: int
    tokens_per_microbatch: int
    bin_length: int | None = None
    buffer_size: int = 512
    flush_every_rollout: bool = True
    share_prompts: bool = True
    max_seq_len: int | None = None
    estimator: str | Estimator = "group_mean_std"
    drop_dead_groups: bool = True
    refill_dead_groups: bool = False
    prefetch: int = 0


def build_graph(
    reader: BaseNode[Prompt],
    *,
    sampler: Sampler,
    pool: RewardPool,
    options: GraphOptions,
    rank: int,
    world_size: int = 1,
    tokenizer: str | None = None,
    on_quarantine: Callable[[dict[str, Any]], None] = log_quarantine,
    splitter: Splitter | None = None,
    record: Callable[[BaseNode[Rollout]], BaseNode[Rollout]] | None = None,
) -> BaseNode[PackedBatch]:
    """The nodes, composed.

    Args:
        reader: this rank's prompts.
        sampler: called on the prefetch thread where there is one.
        pool: the rewards.
        options: for the nodes.
        rank: data-parallel rank.
        world_size: data-parallel ranks.
        tokenizer: the trainer's tokenizer fingerprint, which completions must carry; None does not compare.
        on_quarantine: see :class:`~gspo.data.advantage.Advantage`.
        splitter: cuts completions into segments, see :class:`~gspo.data.segments.Segment`; None leaves them whole.
        record: puts a node that looks at rollouts between advantages and packing.

    Raises:
        InputError: an option that a node refuses, a group size too small for the estimator, or a negative prefetch.
    """
    if options.prefetch < 0:
        raise InputError(
            f"prefetch: {options.prefetch} is negative. Set it to 0 to make microbatches on demand."
        )
    check_group_size(options.estimator, options.group_size)
    node: BaseNode[Any] = Sample(
        reader,
        sampler,
        prompts_per_rollout=options.prompts_per_rollout,
        group_size=options.group_size,
        params=options.params,
        seed=options.seed,
        rank=rank,
        world_size=world_size,
        tokenizer=tokenizer,
        max_tokens=(options.bin_length or options.tokens_per_microbatch) + 1,
    )
    node = Advantage(
        Score(node, pool),
        options.estimator,
        drop_dead_groups=options.drop_dead_groups,
        refill_dead_groups=options.refill_dead_groups,
        on_quarantine=on_quarantine,
    )
    if splitter is not None:
        node = Segment(node, splitter)
    node = Pack(
        node if record is None else record(node),
        tokens_per_microbatch=options.tokens_per_microbatch,
        bin_length=options.bin_length,
        buffer_size=options.buffer_size,
        flush_every_rollout=options.flush_every_rollout,
        share_prompts=options.share_prompts,
        max_seq_len=options.max_seq_len,
    )
    return prefetched(node, options.prefetch) if options.prefetch else node
