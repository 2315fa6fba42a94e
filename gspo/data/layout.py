"""Whole documents into bins, bins into microbatches.

A document of n tokens takes n - 1 places: its last token is only ever a label. Documents are never cut. Those of one
group in one bin stand behind one copy of their prompt, which saves its places for all but the first; the gradient is
the same, since a prompt's hidden states do not depend on what follows. Two layouts:

- ``bin_length`` an int, for a GPU: long bins of that length, attention by document under a block mask. A bin takes the
  buffer's documents in order of age while they fit, then the longest that still fit into the gap.
- ``bin_length`` None, for a CPU, where a dense mask costs the square of the bin: many bins, each as long as the longest
  document in the microbatch (a multiple of 8), which shorter ones share by best fit. Documents of a group share a
  prompt as long as the square of their bin costs no more than apart. A microbatch takes documents in
  order of age, so that its mix of lengths is that of the rollout.

In both the oldest document is always in the next microbatch, which bounds how stale one can become.

What is not here: masks, ``ref_logps``, staleness; they need the model, or the version that trains.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch

from gspo.data.bins import best_fit, share_prefixes, short_bins
from gspo.types import PackedBatch, Rollout

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Document:
    """One prompt with one completion, as the packer sees it."""

    tokens: list[int]  # of the prompt, then of the completion
    num_prompt_tokens: int
    logps: list[float]  # nats, one for each token of the completion
    advantage: float
    reward: float
    temperature: float
    policy_version: int
    prompt_id: str
    group_id: int
    segments: list[int] = field(
        default_factory=list
    )  # of each token of the completion; empty: it is not cut
    segment_advantages: list[float] = field(
        default_factory=list
    )  # of each segment; empty: the document's

    @property
    def num_places(self) -> int:
        """Places that it takes in a bin."""
        return len(self.tokens) - 1


_DOCUMENT_FIELDS = tuple(f.name for f in fields(Document))


def rollout_documents(rollout: Rollout) -> list[Document]:
    """One document for each completion, in the rollout's order."""
    return [
        Document(
            tokens=group.prompt.tokens + completion.tokens,
            num_prompt_tokens=len(group.prompt.tokens),
            logps=completion.logps,
            advantage=completion.advantage,
            reward=completion.reward,
            temperature=completion.temperature,
            policy_version=completion.policy_version,
            prompt_id=group.prompt.id,
            group_id=group.id,
            segments=completion.segments,
            segment_advantages=completion.segment_advantages,
        )
        for group in rollout.groups
        for completion in group.completions
    ]


def pack_documents(
    documents: list[Document], bin_length: int | None = None, *, share_prompts: bool = True
) -> PackedBatch:
    """All of ``documents`` in one batch, as many bins as best fit needs.

    Args:
        documents: any number, none included; one group's next to each other, and in a bin they keep this order.
        bin_length: S; None fits the bins to the documents, see :func:`~gspo.data.bins.short_bins`.
        share_prompts: one copy of its prompt for all documents of a group in a bin.

    Raises:
        ValueError: a document is longer than a bin.
    """
    groups = _groups(documents, share_prompts)
    units, sizes = share_prefixes(
        *_sizes(documents), groups, bin_length or sum(d.num_places for d in documents)
    )
    if bin_length is None:
        bin_length, bins = short_bins(sizes)
    else:
        bins = best_fit(sizes, bin_length)
    bin_of = {
        document: chosen for unit, chosen in zip(units, bins, strict=True) for document in unit
    }
    return build_batch(
        documents,
        [bin_of[i] for i in range(len(documents))],
        bin_length,
        share_prompts=share_prompts,
    )


def _sizes(documents: list[Document]) -> tuple[list[int], list[int]]:
    """Places of each alone, and those of them that its prompt takes; the last prompt token goes with the completion."""
    return [d.num_places for d in documents], [d.num_prompt_tokens - 1 for d in documents]


def _groups(documents: list[Document], share_prompts: bool) -> list[int]:
    """A number for each document, the same for those that can share a prompt."""
    if not share_prompts:
        return list(range(len(documents)))
    numbers: dict[Any, int] = {}
    keys = [
        (d.prompt_id, d.group_id) if d.num_prompt_tokens > 1 else i for i, d in enumerate(documents)
    ]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def build_batch(
    documents: list[Document], bin_of: list[int], bin_length: int, *, share_prompts: bool = True
) -> PackedBatch:
    """The tensors of ``documents`` laid out in the bins given; no documents give one bin of padding.

    Args:
        documents: those of one bin and one group stand in it in this order, groups in the order of their first.
        bin_of: the bin of each, from 0 without gaps.
        bin_length: S, at least what the documents of each bin take.
        share_prompts: those of one group in one bin share the places of their prompt.
    """
    bins, group = (
        np.array(bin_of, dtype=np.int64),
        np.array(_groups(documents, share_prompts), dtype=np.int64),
    )
    order = np.lexsort((group, bins))
    documents, bins, group = [documents[i] for i in order], bins[order], group[order]
    num_documents, num_bins = len(documents), int(bins[-1]) + 1 if documents else 1
    num_tokens = np.array([len(d.tokens) for d in documents], dtype=np.int64)
    num_prompt_tokens = np.array([d.num_prompt_tokens for d in documents], dtype=np.int64)
    label_counts = num_tokens - num_prompt_tokens

    # What stands in the bins: documents, and before the first of each group that shares its prompt a prefix, which is
    # the prompt but for its last token, whose label is each completion's first. Prefixes are numbered after documents.
    leads = np.ones(num_documents, dtype=np.bool_)  # the first of its group in its bin
    leads[1:] = (bins[1:] != bins[:-1]) | (group[1:] != group[:-1])
    run = np.cumsum(leads) - 1
    shares = np.bincount(run, minlength=1)[run] > 1
    leaders = np.flatnonzero(leads & shares)
    own = np.arange(num_documents + leaders.size)
    prefix_index = np.append(own, own.size)
    prefix_index[:num_documents][shares] = num_documents - 1 + np.cumsum(leads & shares)[shares]
    source = np.append(own[:num_documents], leaders)  # the document whose tokens each has
    index = np.lexsort((own < num_documents, source))  # in the order in which they stand
    source, is_prefix = source[index], index >= num_documents
    skipped = np.where(
        shares[source] & ~is_prefix, num_prompt_tokens[source] - 1, 0
    )  # places left to the prefix
    num_places = np.where(is_prefix, num_prompt_tokens[source], num_tokens[source] - skipped) - 1

    piece, offsets, places, padding_positions = _lay_out(
        num_places, bins[source], num_bins, bin_length
    )
    offsets += skipped[piece]
    flat = np.fromiter(
        chain.from_iterable(d.tokens for d in documents), np.int64, int(num_tokens.sum())
    )
    token = (np.cumsum(num_tokens) - num_tokens)[source[piece]] + offsets
    sampled = ~is_prefix[piece] & (offsets >= num_prompt_tokens[source[piece]] - 1)
    logps = np.fromiter(chain.from_iterable(d.logps for d in documents), np.float64)

    def spread(values: Any, default: Any, dtype: Any, at: Any = places) -> torch.Tensor:
        spread_out = np.empty(num_bins * bin_length, dtype)
        spread_out[...] = default
        spread_out[at] = values
        return torch.from_numpy(spread_out)

    def per_document(values: list[Any], other: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([*values, *[other] * (leaders.size + 1)], dtype=dtype)

    numbers, segment_advantages = _number_segments(documents)
    return PackedBatch(
        num_bins=num_bins,
        tokens=spread(flat[token], 0, np.int64),
        labels=spread(flat[token + 1], 0, np.int64),
        positions=spread(offsets, padding_positions, np.int64),
        document_index=spread(index[piece], own.size, np.int64),
        loss_mask=spread(sampled, False, np.bool_),
        old_logps=spread(logps, 0.0, np.float32, at=places[sampled]),
        advantages=per_document([d.advantage for d in documents], 0.0, torch.float32),
        rewards=per_document([d.reward for d in documents], 0.0, torch.float32),
        label_counts=per_document(label_counts.tolist(), 0, torch.int64),
        policy_version=per_document([d.policy_version for d in documents], 0, torch.int64),
        temperature=per_document([d.temperature for d in documents], 1.0, torch.float32),
        prefix_index=torch.from_numpy(prefix_index) if leaders.size else None,
        num_documents=num_documents,
        num_label_tokens=int(label_counts.sum()),
        segment_index=None if numbers is None else spread(numbers, 0, np.int64, at=places[sampled]),
        segment_advantages=segment_advantages,
        ids=[(d.prompt_id, d.group_id) for d in documents],
        stats={"packing_efficiency": (float(piece.size), float(num_bins * bin_length))},
    )


def _number_segments(documents: list[Document]) -> tuple[IntArray | None, torch.Tensor | None]:
    """For each labelled token its segment, numbered through the batch; [K] advantages. None where nothing is cut."""
    if not any(d.segments for d in documents):
        return None, None
    counts = [max(d.segments, default=0) + 1 for d in documents]
    starts = accumulate(counts[:-1], initial=0)
    own = (d.segments or [0] * len(d.logps) for d in documents)
    index = np.array(
        [start + n for start, ns in zip(starts, own, strict=True) for n in ns], dtype=np.int64
    )
    if not any(d.segment_advantages for d in documents):
        return index, None
    given = (
        d.segment_advantages or [d.advantage] * n for d, n in zip(documents, counts, strict=True)
    )
    return index, torch.tensor(list(chain.from_iterable(given)), dtype=torch.float32)


def _lay_out(
    num_places: IntArray,  # [P] of each piece
    bins: IntArray,  # [P], ascending
    num_bins: int,
    bin_length: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """For each place used, its piece, its offset in that and in the batch; and the positions of padding, [T]."""
    before = np.cumsum(num_places) - num_places  # places of earlier pieces
    used = np.bincount(bins, weights=num_places, minlength=num_bins).astype(np.int64)
    starts = before + (bins * bin_length - (np.cumsum(used) - used)[bins])
    piece = np.repeat(np.arange(num_places.size), num_places)
    offsets = np.arange(piece.size) - before[piece]
    padding_positions = (np.arange(bin_length) - used[:, None]).reshape(
        -1
    )  # from 0 behind each bin's pieces
    return piece, offsets, starts[piece] + offsets, padding_positions
