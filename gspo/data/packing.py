"""Whole documents into bins, bins into microbatches.

A document of n tokens takes n - 1 places: its last token is only ever a label. Documents are never cut. Two layouts:

- ``bin_length`` an int, for a GPU: long bins of that length, attention by document under a block mask. A bin takes the
  buffer's documents in order of age while they fit, then the longest that still fit into the gap.
- ``bin_length`` None, for a CPU, where a dense mask costs the square of the bin: many bins, each as long as the longest
  document in the microbatch (a multiple of 8), which shorter ones share by best fit. A microbatch takes documents in
  order of age, so that its mix of lengths is that of the rollout.

In both the oldest document is always in the next microbatch, which bounds how stale one can become.

What is not here: masks, ``ref_logps``, staleness; they need the model, or the version that trains.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
import torch
from torchdata.nodes import BaseNode

from gspo.errors import InputError
from gspo.types import PackedBatch, Rollout

Stats = dict[str, tuple[float, float]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]

_MULTIPLE = 8  # bins as long as their longest document are rounded up to this, for fewer distinct shapes
_SHORT_BIN = 64  # up to here a dense mask costs next to nothing, so bins may be longer than their longest document
_FULL_ENOUGH = 0.95
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


def pack_documents(documents: list[Document], bin_length: int | None = None) -> PackedBatch:
    """All of ``documents`` in one batch, as many bins as best fit needs.

    Args:
        documents: any number, none included; inside a bin they keep this order.
        bin_length: S; None fits the bins to the documents, see :func:`short_bins`.

    Raises:
        ValueError: a document is longer than a bin.
    """
    places = [d.num_places for d in documents]
    if bin_length is None:
        bin_length, bin_of = short_bins(places)
    else:
        bin_of = best_fit(places, bin_length)
    return build_batch(documents, bin_of, bin_length)


def best_fit(places: list[int], bin_length: int) -> list[int]:
    """The bin of each document: longest first, each into the fullest bin that takes it, else into a new one.

    Raises:
        ValueError: a document is longer than a bin.
    """
    if max(places, default=0) > bin_length:
        raise ValueError(f"a document takes {max(places)} places, more than bin_length {bin_length}; raise it")
    bin_of = [0] * len(places)
    spaces: list[int] = []  # free places of the open bins, ascending
    bins: list[int] = []  # which bins these are
    num_bins = 0
    for document in sorted(range(len(places)), key=places.__getitem__, reverse=True):
        size = places[document]
        i = bisect_left(spaces, size)
        if i == len(spaces):
            space, chosen = bin_length, num_bins
            num_bins += 1
        else:
            space, chosen = spaces.pop(i), bins.pop(i)
        bin_of[document] = chosen
        i = bisect_left(spaces, space - size)
        spaces.insert(i, space - size)
        bins.insert(i, chosen)
    return bin_of


def short_bins(places: list[int], max_length: int | None = None) -> tuple[int, list[int]]:
    """The bin length for a dense mask, and the bin of each document.

    It is the longest document's, rounded up to a multiple of 8; where that leaves more than 5 % empty, the multiple up
    to 64 that leaves least. Documents of 10 places go four to a bin of 40, not one to a bin of 16.

    Args:
        places: of each document.
        max_length: an upper limit, at least the longest document.
    """
    limit = max_length or max([_SHORT_BIN, *places]) + _MULTIPLE
    shortest = min(-(-max([1, *places]) // _MULTIPLE) * _MULTIPLE, limit)
    best: tuple[int, list[int]] = shortest, best_fit(places, shortest)
    for length in range(shortest + _MULTIPLE, min(_SHORT_BIN, limit) + 1, _MULTIPLE):
        if sum(places) >= _FULL_ENOUGH * _total_places(*best):
            break
        best = min(best, (length, best_fit(places, length)), key=lambda layout: _total_places(*layout))
    return best


def take_short_bins(places: list[int], max_places: int) -> tuple[list[int], int, list[int]]:
    """As many documents from the front as fit into ``max_places`` places of :func:`short_bins`.

    Returns:
        Indices into ``places``, the bin length, and the bin of each document taken.
    """
    num_taken = int(np.searchsorted(np.cumsum(places), max_places, side="right"))
    while True:
        length, bin_of = short_bins(places[:num_taken], max_places)
        total = _total_places(length, bin_of)
        if total <= max_places:
            return list(range(num_taken)), length, bin_of
        num_taken = min(num_taken - 1, num_taken * max_places // total)


def take_long_bins(places: list[int], bin_length: int, max_bins: int) -> tuple[list[int], int, list[int]]:
    """Fill up to ``max_bins`` bins in turn: documents in order of age while they fit, then the longest into the gap.

    Returns:
        Indices into ``places``, the bin length, and the bin of each document taken.
    """
    sizes = np.array(places, dtype=np.int64)
    waiting = np.ones(sizes.size, dtype=np.bool_)
    taken: list[int] = []
    bin_of: list[int] = []
    for current in range(max_bins):
        oldest = np.flatnonzero(waiting)
        filled = np.cumsum(sizes[oldest])
        chosen = oldest[: np.searchsorted(filled, bin_length, side="right")].tolist()
        if not chosen:
            break
        waiting[chosen] = False
        space = bin_length - int(filled[len(chosen) - 1])
        while (fitting := np.where(waiting & (sizes <= space), sizes, 0)).any():
            longest = int(fitting.argmax())
            chosen.append(longest)
            waiting[longest] = False
            space -= places[longest]
        taken += chosen
        bin_of += [current] * len(chosen)
    return taken, bin_length, bin_of


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
    if bin_length is None and (max_seq_len < _SHORT_BIN or max_seq_len % _MULTIPLE):
        raise InputError(
            f"packing.bin_length: null makes bins of up to {_SHORT_BIN} tokens or of the longest document, rounded up "
            f"to a multiple of {_MULTIPLE}; the model's max_seq_len is {max_seq_len}. "
            f"Set bin_length to {max_seq_len} or less, or make model.max_seq_len a multiple of {_SHORT_BIN}."
        )


def build_batch(documents: list[Document], bin_of: list[int], bin_length: int) -> PackedBatch:
    """The tensors of ``documents`` laid out in the bins given; no documents give one bin of padding.

    Args:
        documents: D - 1 of them; those of one bin stand in it in this order.
        bin_of: the bin of each, from 0 without gaps.
        bin_length: S, at least the sum of ``num_places`` in each bin.
    """
    order = np.argsort(np.array(bin_of, dtype=np.int64), kind="stable")
    documents = [documents[i] for i in order]
    bins = np.array(bin_of, dtype=np.int64)[order]
    num_bins = int(bins[-1]) + 1 if documents else 1
    num_tokens = np.array([len(d.tokens) for d in documents], dtype=np.int64)
    num_prompt_tokens = np.array([d.num_prompt_tokens for d in documents], dtype=np.int64)
    index, offsets, places, padding_positions = _lay_out(num_tokens - 1, bins, num_bins, bin_length)
    flat = np.fromiter(chain.from_iterable(d.tokens for d in documents), np.int64, int(num_tokens.sum()))
    source = np.arange(index.size) + index  # every earlier document has one token more than places
    sampled = offsets >= num_prompt_tokens[index] - 1
    logps = np.fromiter(chain.from_iterable(d.logps for d in documents), np.float64)

    def spread(values: Any, default: Any, dtype: Any, at: Any = places) -> torch.Tensor:
        spread_out = np.empty(num_bins * bin_length, dtype)
        spread_out[...] = default
        spread_out[at] = values
        return torch.from_numpy(spread_out)

    label_counts = np.append(num_tokens - num_prompt_tokens, 0)
    return PackedBatch(
        num_bins=num_bins,
        tokens=spread(flat[source], 0, np.int64),
        labels=spread(flat[source + 1], 0, np.int64),
        positions=spread(offsets, padding_positions, np.int64),
        document_index=spread(index, len(documents), np.int64),
        loss_mask=spread(sampled, False, np.bool_),
        old_logps=spread(logps, 0.0, np.float32, at=places[sampled]),
        advantages=_per_document([d.advantage for d in documents], 0.0, torch.float32),
        rewards=_per_document([d.reward for d in documents], 0.0, torch.float32),
        label_counts=torch.from_numpy(label_counts),
        policy_version=_per_document([d.policy_version for d in documents], 0, torch.int64),
        temperature=_per_document([d.temperature for d in documents], 1.0, torch.float32),
        num_documents=len(documents),
        num_label_tokens=int(label_counts.sum()),
        ids=[(d.prompt_id, d.group_id) for d in documents],
        stats={"packing_efficiency": (float(index.size), float(num_bins * bin_length))},
    )


def _lay_out(
    num_places: IntArray,  # [D - 1]
    bins: IntArray,  # [D - 1], ascending
    num_bins: int,
    bin_length: int,
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """For each place used, its document, its offset in that and in the batch; and the positions of padding, [T]."""
    before = np.cumsum(num_places) - num_places  # places of earlier documents
    used = np.bincount(bins, weights=num_places, minlength=num_bins).astype(np.int64)
    starts = before + (bins * bin_length - (np.cumsum(used) - used)[bins])
    index = np.repeat(np.arange(num_places.size), num_places)
    offsets = np.arange(index.size) - before[index]
    padding_positions = (np.arange(bin_length) - used[:, None]).reshape(-1)  # from 0 behind each bin's documents
    return index, offsets, starts[index] + offsets, padding_positions


def _per_document(values: list[Any], padding: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([*values, padding], dtype=dtype)


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
    ) -> None:
        super().__init__()
        for name, value in (("tokens_per_microbatch", tokens_per_microbatch), ("buffer_size", buffer_size)):
            if value < 1:
                raise InputError(f"{name}: {value} is too small. Set it to 1 or more.")
        if bin_length is not None and (bin_length < 1 or tokens_per_microbatch % bin_length):
            raise InputError(
                f"bin_length: {bin_length} does not divide tokens_per_microbatch: {tokens_per_microbatch}. "
                f"Set it to {tokens_per_microbatch} for one long bin, or to null for bins as long as their documents."
            )
        self.source = source
        self.tokens_per_microbatch, self.bin_length = tokens_per_microbatch, bin_length
        self.buffer_size, self.flush_every_rollout = buffer_size, flush_every_rollout

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
        places = [d.num_places for d in self._documents]
        if self.bin_length is None:
            return self._emit(drawn, *take_short_bins(places, self.tokens_per_microbatch))
        max_bins = self.tokens_per_microbatch // self.bin_length
        return self._emit(drawn, *take_long_bins(places, self.bin_length, max_bins))

    def _wants_more(self) -> bool:
        if self.flush_every_rollout:
            return not self._documents
        num_places = sum(d.num_places for d in self._documents)
        return len(self._documents) < self.buffer_size or num_places < self.tokens_per_microbatch

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
        batch = build_batch([self._documents[i] for i in taken], bin_of, bin_length)
        for rollout in drawn:
            batch.stats = merge_stats(batch.stats, rollout.stats)
        share = len(taken) / len(self._documents) if taken else 1.0
        dropped = [round(share * count) for count in self._dropped]
        self._dropped = [count - part for count, part in zip(self._dropped, dropped, strict=True)]
        batch.num_documents += dropped[0]
        batch.num_label_tokens += dropped[1]
        gone = set(taken)
        self._documents = [d for i, d in enumerate(self._documents) if i not in gone]
        return batch


def _total_places(bin_length: int, bin_of: list[int]) -> int:
    return bin_length * (max(bin_of, default=0) + 1)
