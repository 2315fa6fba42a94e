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
from torchdata.nodes import BaseNode

from gspo.data.bins import MULTIPLE, SHORT_BIN, best_fit, share_prefixes, short_bins, take_long_bins, take_short_bins
from gspo.errors import InputError
from gspo.types import PackedBatch, Rollout

Stats = dict[str, tuple[float, float]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]

_EMPTY_BIN = 8  # length of the bin of padding that stands for a rollout without a live document


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
    segments: list[int] = field(default_factory=list)  # of each token of the completion; empty: it is not cut
    segment_advantages: list[float] = field(default_factory=list)  # of each segment; empty: the document's

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


def merge_stats(stats: Stats, more: Stats) -> Stats:
    """Metric sums of both: names ending in ``/max`` or ``/min`` take the larger or smaller, others add up."""
    merged = dict(stats)
    for name, pair in more.items():
        if name not in merged:
            merged[name] = pair
        elif name.endswith("/max"):
            merged[name] = max(merged[name], pair)
        elif name.endswith("/min"):
            merged[name] = min(merged[name], pair)
        else:
            merged[name] = (merged[name][0] + pair[0], merged[name][1] + pair[1])
    return merged


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
    units, sizes = share_prefixes(*_sizes(documents), groups, bin_length or sum(d.num_places for d in documents))
    if bin_length is None:
        bin_length, bins = short_bins(sizes)
    else:
        bins = best_fit(sizes, bin_length)
    bin_of = {document: chosen for unit, chosen in zip(units, bins, strict=True) for document in unit}
    return build_batch(documents, [bin_of[i] for i in range(len(documents))], bin_length, share_prompts=share_prompts)


def _sizes(documents: list[Document]) -> tuple[list[int], list[int]]:
    """Places of each alone, and those of them that its prompt takes; the last prompt token goes with the completion."""
    return [d.num_places for d in documents], [d.num_prompt_tokens - 1 for d in documents]


def _groups(documents: list[Document], share_prompts: bool) -> list[int]:
    """A number for each document, the same for those that can share a prompt."""
    if not share_prompts:
        return list(range(len(documents)))
    numbers: dict[Any, int] = {}
    keys = [(d.prompt_id, d.group_id) if d.num_prompt_tokens > 1 else i for i, d in enumerate(documents)]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def check_bin_length(bin_length: int | None, max_seq_len: int) -> None:
    """Refuse a layout whose bins could be longer than the model takes.

    Raises:
        InputError: bins of ``bin_length``, or those that :func:`short_bins` chooses, may exceed ``max_seq_len``.
    """
    if bin_length is not None and bin_length > max_seq_len:
        raise InputError(
            f"packing.bin_length: {bin_length} is more than the model's max_seq_len {max_seq_len}. "
            "Lower it, or raise model.max_seq_len."
        )
    if bin_length is None and (max_seq_len < SHORT_BIN or max_seq_len % MULTIPLE):
        raise InputError(
            f"packing.bin_length: null makes bins of up to {SHORT_BIN} tokens or of the longest document, rounded up "
            f"to a multiple of {MULTIPLE}; the model's max_seq_len is {max_seq_len}. "
            f"Set bin_length to {max_seq_len} or less, or make model.max_seq_len a multiple of {SHORT_BIN}."
        )


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
    bins, group = np.array(bin_of, dtype=np.int64), np.array(_groups(documents, share_prompts), dtype=np.int64)
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
    skipped = np.where(shares[source] & ~is_prefix, num_prompt_tokens[source] - 1, 0)  # places left to the prefix
    num_places = np.where(is_prefix, num_prompt_tokens[source], num_tokens[source] - skipped) - 1

    piece, offsets, places, padding_positions = _lay_out(num_places, bins[source], num_bins, bin_length)
    offsets += skipped[piece]
    flat = np.fromiter(chain.from_iterable(d.tokens for d in documents), np.int64, int(num_tokens.sum()))
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
    index = np.array([start + n for start, ns in zip(starts, own, strict=True) for n in ns], dtype=np.int64)
    if not any(d.segment_advantages for d in documents):
        return index, None
    given = (d.segment_advantages or [d.advantage] * n for d, n in zip(documents, counts, strict=True))
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
    padding_positions = (np.arange(bin_length) - used[:, None]).reshape(-1)  # from 0 behind each bin's pieces
    return piece, offsets, starts[piece] + offsets, padding_positions


class Pack(BaseNode[PackedBatch]):
    """Rollouts in, microbatches of at most ``tokens_per_microbatch`` places out.

    Each batch carries the metric sums of the rollouts drawn since the batch before it. Dropped documents are spread
    over the batches as the live ones are, so that several optimizer steps on one rollout divide by their share of them.
    A rollout without a live document gives at once one bin of padding that carries all, so that a run whose groups are
    all dead moves on, and a model's forward runs on every rank.

    Args:
        source: a node of rollouts with advantages.
        tokens_per_microbatch: R * S of a full microbatch; for an int ``bin_length`` a multiple of it.
        bin_length: S, or None to fit the bins to the documents, see the module.
        buffer_size: documents; without ``flush_every_rollout``, rollouts are drawn until this many wait (and a
            microbatch can be filled). More means fuller bins and staler documents.
        flush_every_rollout: empty the buffer before the next rollout is drawn, so that rollouts and optimizer steps
            line up; the last microbatch of a rollout has fewer bins.
        share_prompts: a bin holds one copy of a group's prompt, which all its documents there attend to.
        max_seq_len: the longest bin that the model takes, for a ``bin_length`` of None.

    Raises:
        InputError: a bad argument; from ``next``, a document that no bin can hold.
    """

    def __init__(
        self,
        source: BaseNode[Rollout],
        *,
        tokens_per_microbatch: int,
        bin_length: int | None = None,
        buffer_size: int = 512,
        flush_every_rollout: bool = True,
        share_prompts: bool = True,
        max_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("tokens_per_microbatch", tokens_per_microbatch), ("buffer_size", buffer_size)):
            if type(value) is not int or value < 1:
                raise InputError(f"packing.{name}: {value} is not a whole number of 1 or more. Change it.")
        if bin_length is not None and (bin_length < 1 or tokens_per_microbatch % bin_length):
            raise InputError(
                f"bin_length: {bin_length} does not divide tokens_per_microbatch: {tokens_per_microbatch}. "
                f"Set it to {tokens_per_microbatch} for one long bin, or to null for bins as long as their documents."
            )
        self.source = source
        self.tokens_per_microbatch, self.bin_length = tokens_per_microbatch, bin_length
        self.buffer_size, self.flush_every_rollout = buffer_size, flush_every_rollout
        self.share_prompts, self.max_seq_len = share_prompts, max_seq_len or tokens_per_microbatch

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on from a state."""
        super().reset(initial_state)
        self.source.reset(None if initial_state is None else initial_state["source"])
        waiting = [] if initial_state is None else initial_state["documents"]
        self._documents = [Document(**d) for d in waiting]  # oldest first
        # Documents and their label tokens that were dropped and no batch has carried yet.
        self._dropped: list[int] = [0, 0] if initial_state is None else list(initial_state["dropped"])

    def get_state(self) -> dict[str, Any]:
        """The source's state and the documents that wait, in plain containers."""
        return {
            "source": self.source.state_dict(),
            "documents": [{name: getattr(d, name) for name in _DOCUMENT_FIELDS} for d in self._documents],
            "dropped": list(self._dropped),
        }

    def next(self) -> PackedBatch:
        """The next microbatch."""
        drawn: list[Rollout] = []
        while self._wants_more():
            try:
                drawn.append(next(self.source))
            except StopIteration:
                if not self._documents:
                    raise
                break
            if not self._ingest(drawn[-1]):
                return self._emit(drawn, [], _EMPTY_BIN, [])
        places, prefixes = _sizes(self._documents)
        groups = _groups(self._documents, self.share_prompts)
        if self.bin_length is None:
            max_length = min(self.tokens_per_microbatch, self.max_seq_len)
            units, sizes = share_prefixes(places, prefixes, groups, max_length)
            bin_length, bins = take_short_bins(sizes, self.tokens_per_microbatch, max_length)
            pairs = [(i, chosen) for unit, chosen in zip(units, bins, strict=False) for i in unit]
            return self._emit(drawn, [i for i, _ in pairs], bin_length, [chosen for _, chosen in pairs])
        max_bins = self.tokens_per_microbatch // self.bin_length
        taken, bin_of = take_long_bins(places, prefixes, groups, self.bin_length, max_bins)
        return self._emit(drawn, taken, self.bin_length, bin_of)

    def _wants_more(self) -> bool:
        if self.flush_every_rollout:
            return not self._documents
        places, prefixes = _sizes(self._documents)
        seen: set[int] = set()
        for i, group in enumerate(_groups(self._documents, self.share_prompts)):
            places[i] -= prefixes[i] if group in seen else 0
            seen.add(group)
        return len(self._documents) < self.buffer_size or sum(places) < self.tokens_per_microbatch

    def _ingest(self, rollout: Rollout) -> int:
        documents = rollout_documents(rollout)
        for document in documents:
            self._check(document)
        self._documents += documents
        self._dropped[0] += rollout.dropped_documents
        self._dropped[1] += rollout.dropped_tokens
        return len(documents)

    def _check(self, document: Document) -> None:
        key = "tokens_per_microbatch" if self.bin_length is None else "bin_length"
        limit = getattr(self, key)
        if document.num_places > limit:
            raise InputError(
                f"{key}: {limit} is too small for a document of prompt {document.prompt_id}, which has "
                f"{len(document.tokens)} tokens (prompt and completion). Raise {key} to {document.num_places} or more, "
                f"lower max_new_tokens, or leave the prompt out."
            )
        if document.num_prompt_tokens < 1:
            raise InputError(
                f"prompt {document.prompt_id} has no tokens. A completion's first token needs one before it."
            )

    def _emit(self, drawn: list[Rollout], taken: list[int], bin_length: int, bin_of: list[int]) -> PackedBatch:
        batch = build_batch([self._documents[i] for i in taken], bin_of, bin_length, share_prompts=self.share_prompts)
        for rollout in drawn:
            batch.stats = merge_stats(batch.stats, rollout.stats)
        share = len(taken) / len(self._documents) if taken else 1.0
        dropped = [round(share * count) for count in self._dropped]
        self._dropped = [count - part for count, part in zip(self._dropped, dropped, strict=True)]
        batch.num_documents += dropped[0]
        batch.num_label_tokens += dropped[1]
        gone = set(taken)
        self._documents = [d for i, d in enumerate(self._documents) if i not in gone]
        batch.rollout_continues = self.flush_every_rollout and bool(self._documents)
        return batch
