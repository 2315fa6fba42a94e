"""The attention mask of packed documents: dense for a CPU, in blocks for FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gspo.parallel.split import Shard
from gspo.types import PackedBatch

AttentionMask = Tensor | BlockMask | None
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_CPU = torch.device("cpu")
_BLOCK = 128  # slots of a block of FlexAttention


def document_mask(
    shard: Shard,
    device: torch.device,
    *,
    window: int | None = None,
    in_blocks: bool | None = None,
) -> AttentionMask:
    """Build the mask of causal attention inside each document and to its prefix.

    Keys come in the shard's ``order``. None, for plain causal attention, where no bin holds two
    documents and none is longer than the window.

    Args:
        shard: this rank's part of a batch.
        device: of the mask.
        window: tokens of its document that a token attends to, itself included, counted through
            the prefix; None for all before it.
        in_blocks: a FlexAttention block mask, or [R, S / C, S] bool; None: blocks on CUDA alone.
    """
    num_ranks = shard.slots.shape[0]
    batch = shard.whole
    if window is not None and window >= batch.bin_length and batch.prefix_index is None:
        window = None
    if window is None and num_ranks == 1 and _one_document_per_bin(batch):
        return None
    if in_blocks is None:
        in_blocks = device.type == "cuda"
    if in_blocks:
        return block_mask(shard, device, window)
    layout = _Layout.of(shard, device)
    key_slots = layout.kv_slot[:, None, :]
    key_documents = layout.kv_document[:, None, :]
    is_before = layout.q_slot[:, :, None] >= key_slots
    in_document = layout.q_document[:, :, None] == key_documents
    in_prefix = layout.q_prefix[:, :, None] == key_documents
    is_seen = is_before & (in_document | in_prefix)
    if window is not None:
        distance = layout.q_position[:, :, None] - layout.kv_position[:, None, :]
        is_seen &= distance < window
    return is_seen


def block_mask(shard: Shard, device: torch.device, window: int | None = None) -> BlockMask:
    """Build FlexAttention's form of the mask from its blocks.

    torch's ``create_block_mask`` makes the dense mask on the way, 4 bytes for each query and key
    (1 GiB at 16,384 slots). Here the CPU compares runs of slots, of which a bin has about as many
    as blocks and documents together.
    """
    num_ranks, num_bins, share = shard.slots.shape
    layout = _Layout.of(shard, _CPU)
    partial, full = [], []
    for number in range(num_bins):
        blocks = _Blocks.of(layout, number, window)
        partial.append(blocks.is_partial)
        full.append(blocks.is_full)
    of_partial = _counts_and_indices(partial)
    of_full = _counts_and_indices(full)
    mask = BlockMask.from_kv_blocks(
        *of_partial,
        *of_full,
        BLOCK_SIZE=_BLOCK,
        mask_mod=mask_mod(shard, device, window),
        seq_lengths=(share, share * num_ranks),
    )
    return mask.to(device)


def mask_mod(shard: Shard, device: torch.device, window: int | None = None) -> MaskFunction:
    """Return the mask in the form that FlexAttention asks for, a function of indices."""
    layout = _Layout.of(shard, device)
    q_slot, q_document, q_prefix = layout.q_slot, layout.q_document, layout.q_prefix
    kv_slot, kv_document = layout.kv_slot, layout.kv_document

    def is_seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        key = kv_document[b, kv]
        is_before = q_slot[b, q] >= kv_slot[b, kv]
        in_document = q_document[b, q] == key
        in_prefix = q_prefix[b, q] == key
        return is_before & (in_document | in_prefix)

    if window is None:
        return is_seen
    width = window
    q_position, kv_position = layout.q_position, layout.kv_position

    def is_seen_in_window(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        distance = q_position[b, q] - kv_position[b, kv]
        return is_seen(b, h, q, kv) & (distance < width)

    return is_seen_in_window


@dataclass(frozen=True, slots=True)
class _Layout:
    """The slots and documents of this rank's queries and of all keys, on the device."""

    q_slot: Tensor  # [R, S / C]
    q_document: Tensor  # [R, S / C]
    q_prefix: Tensor  # [R, S / C]
    q_position: Tensor  # [R, S / C] in the document
    kv_slot: Tensor  # [R, S]
    kv_document: Tensor  # [R, S]
    kv_position: Tensor  # [R, S]

    @classmethod
    def of(cls, shard: Shard, device: torch.device) -> _Layout:
        """Compute the layout from a shard."""
        batch = shard.whole
        mine, order = shard.slots[shard.rank], shard.order
        document = batch.document_index.view(batch.num_bins, -1)
        positions = batch.positions.view(batch.num_bins, -1)
        prefix = document
        if batch.prefix_index is not None:
            prefix = batch.prefix_index[document]
        return cls(
            q_slot=mine.to(device),
            q_document=document.gather(1, mine).to(device),
            q_prefix=prefix.gather(1, mine).to(device),
            q_position=positions.gather(1, mine).to(device),
            kv_slot=order.to(device),
            kv_document=document.gather(1, order).to(device),
            kv_position=positions.gather(1, order).to(device),
        )


@dataclass(frozen=True, slots=True)
class _Runs:
    """The N runs of following slots and positions of one document that lie in one block."""

    first: Tensor  # [N] slot
    last: Tensor  # [N] slot
    block: Tensor  # [N]
    at: Tensor  # [N] index of the first slot among those given
    until: Tensor  # [N] and of the last

    @classmethod
    def of(cls, slots: Tensor, documents: Tensor, positions: Tensor) -> _Runs:
        """Find them.

        Args:
            slots: [L] in their bin.
            documents: [L] of the slots.
            positions: [L] in their document, of the slots.
        """
        index = torch.arange(slots.numel())
        is_start = index % _BLOCK == 0
        is_start[1:] |= documents[1:] != documents[:-1]
        for numbers in (slots, positions):  # positions of padding need not follow one another
            is_start[1:] |= numbers[1:] != numbers[:-1] + 1
        at = is_start.nonzero().flatten()
        end = torch.tensor([slots.numel()])
        after = torch.cat([at[1:], end])
        until = after - 1
        return cls(slots[at], slots[until], at // _BLOCK, at, until)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The blocks of a bin that attention computes, with Q of queries and K of keys."""

    is_partial: Tensor  # [Q, K] bool, some pairs are seen
    is_full: Tensor  # [Q, K] bool, all are

    @classmethod
    def of(cls, layout: _Layout, number: int, window: int | None) -> _Blocks:
        """Find them for bin ``number``; a block that the bin's end cuts is never full."""
        q_slot, kv_slot = layout.q_slot[number], layout.kv_slot[number]
        q_document, kv_document = layout.q_document[number], layout.kv_document[number]
        q_position, kv_position = layout.q_position[number], layout.kv_position[number]
        queries = _Runs.of(q_slot, q_document, q_position)
        keys = _Runs.of(kv_slot, kv_document, kv_position)
        document = q_document[queries.at, None]
        prefix = layout.q_prefix[number][queries.at, None]
        key_document = kv_document[keys.at]
        is_related = (document == key_document) | (prefix == key_document)
        sees_one = is_related & (queries.last[:, None] >= keys.first)
        sees_all = is_related & (queries.first[:, None] >= keys.last)
        if window is not None:
            nearest = q_position[queries.at, None] - kv_position[keys.until]
            furthest = q_position[queries.until, None] - kv_position[keys.at]
            sees_one &= nearest < window
            sees_all &= furthest < window
        is_seen = _any_in_block(sees_one, queries, keys)
        is_full = ~_any_in_block(~sees_all, queries, keys)
        if q_slot.numel() % _BLOCK:
            is_full[-1] = False
        if kv_slot.numel() % _BLOCK:
            is_full[:, -1] = False
        return cls(is_seen & ~is_full, is_full)


def _any_in_block(
    flags: Tensor,  # [runs of queries, runs of keys] bool
    queries: _Runs,
    keys: _Runs,
) -> Tensor:  # [Q, K] bool
    num_queries = int(queries.block[-1]) + 1
    num_keys = int(keys.block[-1]) + 1
    by_query = torch.zeros(num_queries, flags.shape[1], dtype=torch.int32)
    by_query.index_add_(0, queries.block, flags.int())
    by_both = torch.zeros(num_queries, num_keys, dtype=torch.int32)
    by_both.index_add_(1, keys.block, by_query)
    return by_both > 0


def _counts_and_indices(
    blocks: list[Tensor],  # [Q, K] bool of each bin
) -> tuple[Tensor, Tensor]:  # [R, 1, Q] and [R, 1, Q, K] int32
    """Return how many blocks of keys each block of queries has, and which, in ascending order."""
    is_there = torch.stack(blocks)[:, None]
    counts = is_there.sum(-1, dtype=torch.int32)
    order = is_there.int().argsort(dim=-1, descending=True, stable=True)
    return counts, order.int()


def _one_document_per_bin(batch: PackedBatch) -> bool:
    """Whether no bin holds two documents; the causal mask alone is then exact.

    What padding sees does not matter.
    """
    index = batch.document_index.view(batch.num_bins, -1)
    before, after = index[:, :-1], index[:, 1:]
    is_start = after != before
    is_start &= after != batch.padding_document
    return not is_start.any()
