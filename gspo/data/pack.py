"""Batches of groups in, microbatches out.

Two layouts:

- ``bin_length`` an int, for a GPU: long bins of that length, attention by document under a block
  mask. A bin takes the buffer's documents in order of age while they fit, then the longest that
  still fit into the gap.
- ``bin_length`` None, for a CPU, where a dense mask costs the square of the bin: bins of the length
  (a multiple of 8) that costs least by slots and attention together. Longer bins hold more of a
  group behind one prompt and less padding. A microbatch takes documents in order of age, so that
  its mix of lengths is that of the rollout.

In both the oldest document is always in the next microbatch, which bounds how stale one can become.

Not here: the tensors, see :mod:`gspo.data.layout`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torchdata.nodes import BaseNode

from gspo.data.bins import MULTIPLE, take_long_bins, take_short_bins
from gspo.data.layout import Document, build_batch, document_sizes, group_documents
from gspo.errors import DataError, InputError, require
from gspo.metrics import Metrics, merge
from gspo.types import GroupBatch, PackedBatch

_EMPTY_BIN = 8  # length of the bin of padding that stands for a rollout without a live document
_DOCUMENT_FIELDS = tuple(field.name for field in fields(Document))


def check_bin_length(bin_length: int | None, max_seq_len: int) -> None:
    """Refuse a layout whose bins could be longer than the model takes.

    Raises:
        InputError: Bins of ``bin_length`` exceed ``max_seq_len``, or it is None and ``max_seq_len``
            no multiple of 8.
    """
    if bin_length is not None:
        require(
            bin_length <= max_seq_len,
            "bin_length",
            bin_length,
            f"is more than the model's max_seq_len {max_seq_len}",
            "lower it, or raise model.max_seq_len",
        )
    elif max_seq_len % MULTIPLE:
        raise InputError(
            "bin_length",
            must=f"null makes bins of a multiple of {MULTIPLE} slots, and the model's max_seq_len "
            f"is {max_seq_len}",
            remedy=f"set bin_length to {max_seq_len} or less, or make model.max_seq_len a multiple "
            f"of {MULTIPLE}",
        )


@dataclass(frozen=True, slots=True)
class _Choice:
    """The documents of the next microbatch and their bins."""

    documents: list[int]  # numbers in the buffer
    bin_of: list[int]
    bin_length: int


class Pack(BaseNode[PackedBatch]):
    """A node that packs groups into microbatches of at most ``tokens_per_microbatch`` slots.

    Each batch carries the stats of the rollouts drawn since the batch before it. Dropped and
    quarantined documents are spread over the batches as the live ones are, so that several
    optimizer steps on one rollout divide by their share of them and count them as drawn. A rollout
    without a live document gives at once one bin of padding that carries all, so that a run whose
    groups are all dead moves on, and a model's forward runs on every rank.

    Args:
        source: a node of groups with advantages; one of its items is a rollout.
        tokens_per_microbatch: R * S of a full microbatch; for an int ``bin_length`` a multiple.
        bin_length: S, or None to choose it by cost, see the module.
        buffer_size: documents; without ``flush_every_rollout``, rollouts are drawn until this many
            wait (and a microbatch can be filled). More means fuller bins and staler documents.
        flush_every_rollout: empty the buffer before the next rollout is drawn, so that rollouts and
            optimizer steps line up; the last microbatch of a rollout has fewer bins.
        share_prompts: a bin holds one copy of a group's prompt, which all its documents there
            attend to.
        fixed_shape: every microbatch has as many bins, some of them padding if need be. A GPU
            compiles attention anew for each shape.
        max_seq_len: the longest bin that the model takes, for a ``bin_length`` of None.

    Raises:
        InputError: A bad argument. From ``next``: a document that no bin can hold.
    """

    def __init__(
        self,
        source: BaseNode[GroupBatch],
        *,
        tokens_per_microbatch: int,
        bin_length: int | None = None,
        buffer_size: int = 512,
        flush_every_rollout: bool = True,
        share_prompts: bool = True,
        fixed_shape: bool = False,
        max_seq_len: int | None = None,
    ) -> None:
        super().__init__()
        _require_positive("tokens_per_microbatch", tokens_per_microbatch)
        _require_positive("buffer_size", buffer_size)
        if bin_length is not None:
            require(
                bin_length >= 1 and tokens_per_microbatch % bin_length == 0,
                "bin_length",
                bin_length,
                f"does not divide tokens_per_microbatch: {tokens_per_microbatch}",
                f"set it to {tokens_per_microbatch} for one long bin, or to null for bins as long "
                "as their documents",
            )
        # Bins, and their length, of a microbatch without a document; no microbatch has fewer.
        self.empty_shape = (1, _EMPTY_BIN)
        if fixed_shape:
            if bin_length is None:
                must = "must be a number where all microbatches have one shape"
                raise InputError("bin_length", None, must, f"set it to {tokens_per_microbatch}")
            self.empty_shape = (tokens_per_microbatch // bin_length, bin_length)
        self.source = source
        self.tokens_per_microbatch = tokens_per_microbatch
        self.bin_length = bin_length
        self.buffer_size = buffer_size
        self.flush_every_rollout = flush_every_rollout
        self.share_prompts = share_prompts
        self.max_seq_len = max_seq_len or tokens_per_microbatch

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on from a state."""
        super().reset(initial_state)
        state = initial_state or {"source": None, "documents": [], "dropped": [0, 0, 0]}
        self.source.reset(state["source"])
        documents = state["documents"]
        self._documents = [Document(**values) for values in documents]  # oldest first
        # Dropped, and carried by no batch yet.
        num_documents, num_tokens, num_quarantined = state["dropped"]
        self._dropped_documents = num_documents
        self._dropped_tokens = num_tokens
        self._quarantined = num_quarantined

    def get_state(self) -> dict[str, Any]:
        """Return the source's state and the documents that wait, in plain containers."""
        return {
            "source": self.source.state_dict(),
            "documents": [_plain(document) for document in self._documents],
            "dropped": [self._dropped_documents, self._dropped_tokens, self._quarantined],
        }

    def next(self) -> PackedBatch:
        """Return the next microbatch."""
        stats: list[Metrics] = []
        while self._wants_more():
            try:
                rollout = next(self.source)
            except StopIteration:
                if not self._documents:
                    raise
                break
            stats.append(rollout.stats)
            num_live = self._add(rollout)
            if num_live == 0:
                batch = self._emit(_Choice([], [], self.empty_shape[1]), stats)
                batch.lost_to = rollout.lost_to
                return batch
        choice = self._choose_short() if self.bin_length is None else self._choose_long()
        return self._emit(choice, stats)

    def _wants_more(self) -> bool:
        if self.flush_every_rollout:
            return not self._documents
        if len(self._documents) < self.buffer_size:
            return True
        sizes = document_sizes(self._documents, self.share_prompts)
        num_slots = sum(sizes.in_order())
        return num_slots < self.tokens_per_microbatch

    def _add(self, rollout: GroupBatch) -> int:
        """Put the documents of a rollout into the buffer and return how many they are."""
        documents = group_documents(rollout)
        for document in documents:
            self._check(document)
        self._documents += documents
        self._dropped_documents += rollout.dropped_documents
        self._dropped_tokens += rollout.dropped_tokens
        self._quarantined += rollout.quarantined_documents
        return len(documents)

    def _check(self, document: Document) -> None:
        key = "tokens_per_microbatch" if self.bin_length is None else "bin_length"
        limit = self.bin_length or self.tokens_per_microbatch
        if document.num_slots > limit:
            raise InputError(
                key,
                limit,
                f"is too small for a document of prompt {document.prompt_id}, which has "
                f"{len(document.tokens)} tokens (prompt and completion)",
                f"raise {key} to {document.num_slots} or more, lower max_new_tokens, or leave the "
                "prompt out",
            )
        if document.num_prompt_tokens < 1:
            raise DataError(
                f"prompt {document.prompt_id}",
                must="has no tokens",
                remedy="a completion's first token needs one before it",
            )

    def _choose_short(self) -> _Choice:
        sizes = document_sizes(self._documents, self.share_prompts)
        max_length = min(self.tokens_per_microbatch, self.max_seq_len)
        bins = take_short_bins(sizes, self.tokens_per_microbatch, max_length)
        num_taken = len(bins.bin_of)
        documents = list(range(num_taken))  # the oldest
        return _Choice(documents, bins.bin_of, bins.length)

    def _choose_long(self) -> _Choice:
        assert self.bin_length is not None
        sizes = document_sizes(self._documents, self.share_prompts)
        max_bins = self.tokens_per_microbatch // self.bin_length
        documents, bin_of = take_long_bins(sizes, self.bin_length, max_bins)
        return _Choice(documents, bin_of, self.bin_length)

    def _emit(self, choice: _Choice, stats: list[Metrics]) -> PackedBatch:
        """Take the chosen documents out of the buffer, as a batch with the stats of rollouts."""
        waiting = self._documents
        documents = [waiting[i] for i in choice.documents]
        batch = build_batch(
            documents,
            choice.bin_of,
            choice.bin_length,
            share_prompts=self.share_prompts,
            num_bins=self.empty_shape[0],
        )
        batch.stats = merge([batch.stats, *stats])
        self._hand_over_dropped(batch, len(documents))
        taken = set(choice.documents)
        self._documents = [d for i, d in enumerate(waiting) if i not in taken]
        some_wait = bool(self._documents)
        batch.continues = self.flush_every_rollout and some_wait
        return batch

    def _hand_over_dropped(self, batch: PackedBatch, num_taken: int) -> None:
        """Count in ``batch`` its share of the dropped and the quarantined documents."""
        share = num_taken / len(self._documents) if num_taken else 1.0
        num_documents = round(share * self._dropped_documents)
        num_tokens = round(share * self._dropped_tokens)
        num_quarantined = round(share * self._quarantined)
        self._dropped_documents -= num_documents
        self._dropped_tokens -= num_tokens
        self._quarantined -= num_quarantined
        batch.num_documents += num_documents
        batch.num_label_tokens += num_tokens
        batch.num_quarantined += num_quarantined


def _plain(document: Document) -> dict[str, Any]:
    return {name: getattr(document, name) for name in _DOCUMENT_FIELDS}


def _require_positive(name: str, value: int) -> None:
    is_positive = type(value) is int and value >= 1
    require(is_positive, name, value, "is not a whole number of 1 or more", "change it")
