"""Rollouts in, microbatches out."""

from __future__ import annotations

from typing import Any

from torchdata.nodes import BaseNode

from gspo.data.bins import MULTIPLE, SHORT_BIN, share_prefixes, take_long_bins, take_short_bins
from gspo.data.layout import (
    _DOCUMENT_FIELDS,
    Document,
    _groups,
    _sizes,
    build_batch,
    rollout_documents,
)
from gspo.errors import InputError
from gspo.types import PackedBatch, Rollout

Stats = dict[str, tuple[float, float]]


_EMPTY_BIN = 8  # length of the bin of padding that stands for a rollout without a live document


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
        for name, value in (
            ("tokens_per_microbatch", tokens_per_microbatch),
            ("buffer_size", buffer_size),
        ):
            if type(value) is not int or value < 1:
                raise InputError(
                    f"packing.{name}: {value} is not a whole number of 1 or more. Change it."
                )
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
        self._dropped: list[int] = (
            [0, 0] if initial_state is None else list(initial_state["dropped"])
        )

    def get_state(self) -> dict[str, Any]:
        """The source's state and the documents that wait, in plain containers."""
        return {
            "source": self.source.state_dict(),
            "documents": [
                {name: getattr(d, name) for name in _DOCUMENT_FIELDS} for d in self._documents
            ],
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
            return self._emit(
                drawn, [i for i, _ in pairs], bin_length, [chosen for _, chosen in pairs]
            )
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

    def _emit(
        self, drawn: list[Rollout], taken: list[int], bin_length: int, bin_of: list[int]
    ) -> PackedBatch:
        batch = build_batch(
            [self._documents[i] for i in taken],
            bin_of,
            bin_length,
            share_prompts=self.share_prompts,
        )
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
