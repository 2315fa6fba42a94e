"""Whole documents into bins: the tensors of a microbatch.

A document of n tokens takes n - 1 slots: its last token is only ever a label. Documents are never
cut. Those of one group in one bin stand behind one copy of their prompt, which saves its slots for
all but the first; the gradient is the same, since a prompt's hidden states do not depend on what
follows.

Not here: which documents a microbatch takes (:mod:`gspo.data.pack`), and masks, ``ref_logps`` and
staleness, which need the model or the version that trains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch

from gspo.data.bins import (
    DocumentSizes,
    IntArray,
    cheapest_bins,
    fill_bins,
    integers,
    whole_groups,
)
from gspo.metrics import Mean
from gspo.types import GroupBatch, PackedBatch

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


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
    segments: list[int] = field(default_factory=list)  # of each completion token; empty: not cut
    segment_advantages: list[float] = field(default_factory=list)  # empty: the document's own

    @property
    def num_slots(self) -> int:
        """Slots that it takes in a bin."""
        return len(self.tokens) - 1


def group_documents(batch: GroupBatch) -> list[Document]:
    """Return one document for each completion, in the batch's order."""
    documents = []
    for group in batch.groups:
        prompt = group.prompt
        for completion in group.completions:
            document = Document(
                tokens=prompt.tokens + completion.tokens,
                num_prompt_tokens=len(prompt.tokens),
                logps=completion.logps,
                advantage=completion.advantage,
                reward=completion.reward,
                temperature=completion.temperature,
                policy_version=completion.policy_version,
                prompt_id=prompt.id,
                group_id=group.id,
                segments=completion.segments,
                segment_advantages=completion.segment_advantages,
            )
            documents.append(document)
    return documents


def document_sizes(documents: list[Document], share_prompts: bool) -> DocumentSizes:
    """Return the sizes that bins are filled by.

    The last prompt token is not shared: its label is the first of each completion.
    """
    slots = [document.num_slots for document in documents]
    shareable = [document.num_prompt_tokens - 1 for document in documents]
    groups = _prompt_groups(documents, share_prompts)
    return DocumentSizes(slots, shareable, groups)


def _prompt_groups(documents: list[Document], share_prompts: bool) -> list[int]:
    """Number the documents, with the same number for those that can share a prompt."""
    if not share_prompts:
        return list(range(len(documents)))
    numbers: dict[Any, int] = {}
    groups = []
    for i, document in enumerate(documents):
        key: Any = i
        if document.num_prompt_tokens > 1:
            key = (document.prompt_id, document.group_id)
        number = numbers.setdefault(key, len(numbers))
        groups.append(number)
    return groups


def pack_documents(
    documents: list[Document],
    bin_length: int | None = None,
    *,
    share_prompts: bool = True,
    num_bins: int = 1,
) -> PackedBatch:
    """Put all ``documents`` into one batch, in as many bins as best fit needs.

    Args:
        documents: any number, none included. Those of one group stand next to each other and keep
            their order in a bin.
        bin_length: S; None chooses it, see :func:`~gspo.data.bins.cheapest_bins`.
        share_prompts: one copy of its prompt for all documents of a group in a bin.
        num_bins: at least; those without a document are padding.

    Raises:
        ValueError: A document is longer than a bin.
    """
    sizes = document_sizes(documents, share_prompts)
    if bin_length is None:
        bins = cheapest_bins(sizes)
    else:
        groups = whole_groups(sizes)
        bins = fill_bins(groups, bin_length)
    return build_batch(
        documents, bins.bin_of, bins.length, share_prompts=share_prompts, num_bins=num_bins
    )


def build_batch(
    documents: list[Document],
    bin_of: list[int],
    bin_length: int,
    *,
    share_prompts: bool = True,
    num_bins: int = 1,
) -> PackedBatch:
    """Lay out ``documents`` in the bins given; bins without a document are padding.

    Args:
        documents: those of one bin and one group stand in it in this order, groups in the order of
            their first.
        bin_of: the bin of each, from 0 without gaps.
        bin_length: S, at least what the documents of each bin take.
        share_prompts: documents of one group in one bin share the slots of their prompt.
        num_bins: at least.
    """
    bins = integers(bin_of)
    prompt_groups = _prompt_groups(documents, share_prompts)
    groups = integers(prompt_groups)
    order = np.lexsort((groups, bins))
    bins = bins[order]
    groups = groups[order]
    documents = [documents[i] for i in order]
    num_bins = max(num_bins, max(bin_of, default=0) + 1)

    lengths = _Lengths.of(documents)
    prefixes = _find_prefixes(bins, groups)
    pieces = _find_pieces(lengths, prefixes, bins)
    slots = _find_slots(pieces, num_bins, bin_length)
    num_used = slots.at.size
    num_slots = num_bins * bin_length
    efficiency = Mean(float(num_used), float(num_slots))
    num_labels = lengths.labels.sum()
    return PackedBatch(
        num_bins=num_bins,
        **_slot_tensors(documents, lengths, pieces, slots),
        **_document_tensors(documents, lengths, prefixes),
        **_segment_tensors(documents, lengths, slots),
        num_documents=len(documents),
        num_label_tokens=int(num_labels),
        ids=[(document.prompt_id, document.group_id) for document in documents],
        stats={"packing_efficiency": efficiency},
    )


@dataclass(frozen=True, slots=True)
class _Lengths:
    """The lengths of N documents in tokens."""

    tokens: IntArray  # [N]
    prompts: IntArray  # [N]

    @classmethod
    def of(cls, documents: list[Document]) -> _Lengths:
        """Measure documents."""
        tokens = [len(document.tokens) for document in documents]
        prompts = [document.num_prompt_tokens for document in documents]
        return cls(integers(tokens), integers(prompts))

    @property
    def labels(self) -> IntArray:
        """The labelled tokens of each document."""
        return self.tokens - self.prompts


@dataclass(frozen=True, slots=True)
class _Prefixes:
    """The prompts that documents share. Prefixes are numbered after the N documents.

    A prefix is a prompt without its last token, whose label is each completion's first.
    """

    shares: BoolArray  # [N] the document goes on from a prefix
    leaders: IntArray  # of each prefix, the first document that goes on from it
    index: IntArray  # [D] the number of the prefix, or the own one; padding last


def _find_prefixes(
    bins: IntArray,  # [N], ascending
    groups: IntArray,  # [N], ascending in each bin
) -> _Prefixes:
    """Find the groups with several documents in a bin."""
    num_documents = bins.size
    is_first = np.ones(num_documents, dtype=np.bool_)  # of its group in its bin
    is_new_bin = bins[1:] != bins[:-1]
    is_new_group = groups[1:] != groups[:-1]
    is_first[1:] = is_new_bin | is_new_group

    num_runs = np.cumsum(is_first)  # of one group, up to each document
    run = num_runs - 1
    run_lengths = np.bincount(run, minlength=1)
    num_together = run_lengths[run]
    shares = num_together > 1
    leads = is_first & shares
    leaders = np.flatnonzero(leads)
    index = _prefix_index(shares, leads)
    return _Prefixes(shares, leaders, index)


def _prefix_index(
    shares: BoolArray,  # [N] the document goes on from a prefix
    leads: BoolArray,  # [N] it is the first that does
) -> IntArray:  # [D]
    num_documents = shares.size
    num_leaders = np.cumsum(leads)  # up to each document
    prefix_numbers = num_documents - 1 + num_leaders
    num_prefixes = np.count_nonzero(leads)
    num_padding = 1
    index = np.arange(num_documents + num_prefixes + num_padding)
    of_documents = index[:num_documents]
    of_documents[shares] = prefix_numbers[shares]
    return index


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The documents and prefixes that stand in the bins, P in the order in which they stand."""

    number: IntArray  # [P] in the batch
    document: IntArray  # [P] the document whose tokens the piece has
    start: IntArray  # [P] its first token in the document; earlier ones stand in the prefix
    # [P] the token whose label is the completion's first; prefixes end here
    first_labelled: IntArray
    num_slots: IntArray  # [P]
    bins: IntArray  # [P], ascending


def _find_pieces(lengths: _Lengths, prefixes: _Prefixes, bins: IntArray) -> _Pieces:
    """Put each prefix before the first document that goes on from it."""
    num_documents = bins.size
    leaders = prefixes.leaders
    numbers = np.arange(num_documents + leaders.size)
    owners = np.append(numbers[:num_documents], leaders)
    is_document = numbers < num_documents
    order = np.lexsort((is_document, owners))
    document = owners[order]
    is_prefix = order >= num_documents

    last_of_prompt = lengths.prompts[document] - 1
    last = lengths.tokens[document] - 1
    shares = prefixes.shares[document]
    goes_on = shares & ~is_prefix
    start = np.where(goes_on, last_of_prompt, 0)
    end = np.where(is_prefix, last_of_prompt, last)  # a last token is only a label
    return _Pieces(
        number=order,
        document=document,
        start=start,
        first_labelled=last_of_prompt,
        num_slots=end - start,
        bins=bins[document],
    )


@dataclass(frozen=True, slots=True)
class _Slots:
    """The U used slots in the pieces' order, and the positions of padding."""

    at: IntArray  # [U] the slot in the batch
    piece: IntArray  # [U] the piece in it
    positions: IntArray  # [U] of its token in the document
    is_labelled: BoolArray  # [U] its label is a token of the completion
    padding_positions: IntArray  # [T] for every slot: counted from the end of its bin's pieces

    def fill(self, values: Any, default: Any, dtype: Any) -> torch.Tensor:  # [U] -> [T]
        """Spread the values of used slots; the others have ``default``."""
        return self._spread(values, self.at, default, dtype)

    def fill_labelled(self, values: Any, default: Any, dtype: Any) -> torch.Tensor:
        """Spread the values of labelled slots; the others have ``default``."""
        labelled = self.at[self.is_labelled]
        return self._spread(values, labelled, default, dtype)

    def _spread(self, values: Any, at: IntArray, default: Any, dtype: Any) -> torch.Tensor:
        num_slots = self.padding_positions.size
        filled = np.empty(num_slots, dtype)
        filled[...] = default
        filled[at] = values
        return torch.from_numpy(filled)


def _find_slots(pieces: _Pieces, num_bins: int, bin_length: int) -> _Slots:
    """Put the pieces of each bin one after another."""
    sizes = pieces.num_slots
    bins = pieces.bins
    sums = np.bincount(bins, weights=sizes, minlength=num_bins)
    used = sums.astype(np.int64)
    first_used = _sum_before(sizes)  # as if there were no padding
    bin_start = bins * bin_length
    used_before_bin = _sum_before(used)[bins]
    first_slot = bin_start + first_used - used_before_bin

    numbers = np.arange(sizes.size)
    piece = np.repeat(numbers, sizes)
    used_number = np.arange(piece.size)
    offsets = used_number - first_used[piece]
    positions = offsets + pieces.start[piece]
    first_labelled = pieces.first_labelled[piece]
    in_bin = np.arange(bin_length)
    padding_positions = in_bin - used[:, None]
    return _Slots(
        at=first_slot[piece] + offsets,
        piece=piece,
        positions=positions,
        is_labelled=positions >= first_labelled,
        padding_positions=padding_positions.reshape(-1),
    )


def _sum_before(sizes: IntArray) -> IntArray:
    """Return the sum of all earlier sizes for each."""
    sums = np.cumsum(sizes)
    return sums - sizes


def _slot_tensors(
    documents: list[Document], lengths: _Lengths, pieces: _Pieces, slots: _Slots
) -> dict[str, Any]:
    """Return the batch's tensors over slots, segments aside."""
    tokens = _all_tokens(documents, lengths)
    all_logps = chain.from_iterable(document.logps for document in documents)
    logps = np.fromiter(all_logps, np.float64)

    first_of_document = _sum_before(lengths.tokens)
    first_of_piece = first_of_document[pieces.document]
    first = first_of_piece[slots.piece]
    here = first + slots.positions
    behind = here + 1
    token = tokens[here]
    label = tokens[behind]
    number = pieces.number[slots.piece]
    padding_document = pieces.number.size
    return {
        "tokens": slots.fill(token, 0, np.int64),
        "labels": slots.fill(label, 0, np.int64),
        "positions": slots.fill(slots.positions, slots.padding_positions, np.int64),
        "document_index": slots.fill(number, padding_document, np.int64),
        "loss_mask": slots.fill(slots.is_labelled, False, np.bool_),
        "old_logps": slots.fill_labelled(logps, 0.0, np.float32),
    }


def _all_tokens(documents: list[Document], lengths: _Lengths) -> IntArray:
    num_tokens = lengths.tokens.sum()
    tokens = chain.from_iterable(document.tokens for document in documents)
    return np.fromiter(tokens, np.int64, int(num_tokens))


def _segment_tensors(documents: list[Document], lengths: _Lengths, slots: _Slots) -> dict[str, Any]:
    """Return the segments, numbered through the batch, and their advantages.

    A document that is not cut is one segment. There is nothing where no document is cut, and no
    advantages where no segment has its own.
    """
    if not any(document.segments for document in documents):
        return {}
    counts = [max(document.segments, default=0) + 1 for document in documents]
    index = _segment_numbers(documents, counts, lengths)
    segment_index = slots.fill_labelled(index, 0, np.int64)
    tensors = {"segment_index": segment_index}
    if any(document.segment_advantages for document in documents):
        tensors["segment_advantages"] = _segment_advantages(documents, counts)
    return tensors


def _segment_numbers(
    documents: list[Document],
    counts: list[int],  # segments of each document
    lengths: _Lengths,
) -> IntArray:  # [U] of labelled slots
    in_document: list[int] = []
    for document in documents:
        segments = document.segments
        if not segments:
            segments = [0] * len(document.logps)
        in_document += segments
    first_numbers = _sum_before(integers(counts))
    first_of_label = np.repeat(first_numbers, lengths.labels)
    return integers(in_document) + first_of_label


def _segment_advantages(
    documents: list[Document],
    counts: list[int],  # segments of each document
) -> torch.Tensor:  # [K]
    advantages: list[float] = []
    for document, count in zip(documents, counts, strict=True):
        values = document.segment_advantages
        if not values:
            values = [document.advantage] * count
        advantages += values
    return torch.tensor(advantages, dtype=torch.float32)


def _document_tensors(
    documents: list[Document], lengths: _Lengths, prefixes: _Prefixes
) -> dict[str, Any]:
    """Return the batch's tensors over documents, prefixes and padding."""
    num_prefixes = prefixes.leaders.size
    num_others = num_prefixes + 1

    def over_documents(name: str, other: float, dtype: torch.dtype) -> torch.Tensor:
        values = [getattr(document, name) for document in documents]
        values += [other] * num_others
        return torch.tensor(values, dtype=dtype)

    no_labels = np.zeros(num_others, dtype=np.int64)
    label_counts = np.append(lengths.labels, no_labels)
    prefix_index = None
    if num_prefixes > 0:
        prefix_index = torch.from_numpy(prefixes.index)
    return {
        "advantages": over_documents("advantage", 0.0, torch.float32),
        "rewards": over_documents("reward", 0.0, torch.float32),
        "label_counts": torch.from_numpy(label_counts),
        "policy_version": over_documents("policy_version", 0, torch.int64),
        "temperature": over_documents("temperature", 1.0, torch.float32),
        "prefix_index": prefix_index,
    }
