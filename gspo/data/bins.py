"""The bin that each item goes into, by sizes alone.

Not here: documents and tensors, see :mod:`gspo.data.layout`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]

# Bins as long as their longest document are rounded up to this, for fewer distinct shapes.
MULTIPLE = 8
# Up to here a dense mask costs next to nothing, so bins may be longer than their longest document.
SHORT_BIN = 64
_FULL_ENOUGH = 0.95


@dataclass(frozen=True, slots=True)
class DocumentSizes:
    """The sizes of several documents in slots; documents of one group stand next to each other."""

    slots: list[int]  # that each takes alone
    shareable: list[int]  # those of them that hold the prefix it can share with its group
    groups: list[int]  # the group's number


@dataclass(slots=True)
class Unit:
    """Documents of one group that stand behind one copy of their prefix."""

    documents: list[int]  # their numbers
    num_slots: int


class Bins(NamedTuple):
    """Bins of one length, and the bin of each item."""

    length: int
    bin_of: list[int]

    @property
    def num_slots(self) -> int:
        """The slots of all bins, empty ones included."""
        last = max(self.bin_of, default=0)
        num_bins = last + 1
        return self.length * num_bins


def integers(values: list[int]) -> IntArray:
    """Return the values as an array of int64."""
    return np.array(values, dtype=np.int64)


def share_prefixes(sizes: DocumentSizes, max_slots: int) -> list[Unit]:
    """Put documents behind one copy of their prefix, for bins with a dense mask.

    As many stand together as keep the square of their slots, which such a mask costs, no larger
    than apart. Up to 64 slots a mask costs next to nothing.

    Args:
        sizes: of the documents.
        max_slots: an upper limit for several together.
    """
    units: list[Unit] = []
    last_group: int | None = None
    square_apart = 0  # of the last unit's documents
    for document, group in enumerate(sizes.groups):
        alone = sizes.slots[document]
        square = alone**2
        if group == last_group:
            unit = units[-1]
            behind_prefix = alone - sizes.shareable[document]
            together = unit.num_slots + behind_prefix
            square_apart += square
            if together <= max_slots and _is_cheap(together, square_apart):
                unit.documents.append(document)
                unit.num_slots = together
                continue
        unit = Unit([document], alone)
        units.append(unit)
        last_group = group
        square_apart = square
    return units


def _is_cheap(num_slots: int, square_apart: int) -> bool:
    if num_slots <= SHORT_BIN:
        return True
    square_together = num_slots**2
    return square_together <= square_apart


def best_fit(slots: list[int], bin_length: int) -> list[int]:
    """Return the bin of each item: longest first, each into the fullest bin that takes it.

    Args:
        slots: of each item.
        bin_length: S.

    Raises:
        ValueError: An item is longer than a bin.
    """
    longest = max(slots, default=0)
    if longest > bin_length:
        raise ValueError(
            f"a document takes {longest} slots, more than bin_length {bin_length}; raise it"
        )
    bin_of = [0] * len(slots)
    bins = _OpenBins(bin_length)
    items = range(len(slots))
    longest_first = sorted(items, key=slots.__getitem__, reverse=True)
    for item in longest_first:
        bin_of[item] = bins.put(slots[item])
    return bin_of


@dataclass(slots=True)
class _OpenBins:
    """Bins in the order of their free slots, ascending."""

    length: int
    free: list[int] = field(default_factory=list)  # slots
    numbers: list[int] = field(default_factory=list)

    def put(self, size: int) -> int:
        """Put an item into the fullest bin that takes it, else into a new one; return which."""
        fullest = bisect_left(self.free, size)
        if fullest == len(self.free):
            free = self.length
            number = len(self.numbers)
        else:
            free = self.free.pop(fullest)
            number = self.numbers.pop(fullest)
        left = free - size
        rank = bisect_left(self.free, left)
        self.free.insert(rank, left)
        self.numbers.insert(rank, number)
        return number


def short_bins(slots: list[int], max_length: int | None = None) -> Bins:
    """Return short bins for a dense mask.

    They are as long as the longest item, rounded up to a multiple of 8. Where that leaves more than
    5 % empty, they have the multiple up to 64 that leaves least. Documents of 10 slots go four to a
    bin of 40, not one to a bin of 16.

    Args:
        slots: of each item.
        max_length: an upper limit, at least the longest item.
    """
    longest = max([1, *slots])
    limit = max_length or max(SHORT_BIN, longest) + MULTIPLE
    shortest = min(_round_up(longest), limit)
    longest_tried = min(SHORT_BIN, limit)
    num_used = sum(slots)
    best = _bins_of(slots, shortest)
    for length in range(shortest + MULTIPLE, longest_tried + 1, MULTIPLE):
        enough = _FULL_ENOUGH * best.num_slots
        if num_used >= enough:
            break
        longer = _bins_of(slots, length)
        if longer.num_slots < best.num_slots:
            best = longer
    return best


def _round_up(length: int) -> int:
    num_multiples = math.ceil(length / MULTIPLE)
    return num_multiples * MULTIPLE


def _bins_of(slots: list[int], length: int) -> Bins:
    bin_of = best_fit(slots, length)
    return Bins(length, bin_of)


def take_short_bins(slots: list[int], max_slots: int, max_length: int) -> Bins:
    """Fill short bins with as many items from the front as ``max_slots`` slots take.

    Args:
        slots: of each item.
        max_slots: of all bins together.
        max_length: of a bin.

    Returns:
        The bins of the items taken.
    """
    filled = np.cumsum(slots)
    num_taken = _count_fitting(filled, max_slots)
    while True:
        taken = slots[:num_taken]
        bins = short_bins(taken, max_length)
        if bins.num_slots <= max_slots:
            return bins
        in_proportion = num_taken * max_slots // bins.num_slots
        num_taken = min(num_taken - 1, in_proportion)


def _count_fitting(
    filled: IntArray,  # [N] slots that the items up to each take
    max_slots: int,
) -> int:
    num_fitting = np.searchsorted(filled, max_slots, side="right")
    return int(num_fitting)


def take_long_bins(
    sizes: DocumentSizes, bin_length: int, max_bins: int
) -> tuple[list[int], list[int]]:
    """Fill up to ``max_bins`` bins in turn, each with the oldest documents, then the longest.

    Documents come in order of age while they fit, then the longest that fits into the gap. A
    document whose group is in the bin already does not bring its prefix again.

    Args:
        sizes: of the documents, the oldest first.
        bin_length: S.
        max_bins: the number of bins that may be filled.

    Returns:
        The numbers of the documents taken, and the bin of each.
    """
    waiting = _Waiting(sizes)
    taken: list[int] = []
    bin_of: list[int] = []
    for current in range(max_bins):
        chosen, num_free = waiting.take_oldest(bin_length)
        if not chosen:
            break
        chosen += waiting.fill_gap(num_free, chosen)
        taken += chosen
        bin_of += [current] * len(chosen)
    return taken, bin_of


class _Waiting:
    """Documents that wait for a long bin, the oldest first."""

    def __init__(self, sizes: DocumentSizes) -> None:
        alone = integers(sizes.slots)
        shareable = integers(sizes.shareable)
        self._alone = alone
        self._behind = alone - shareable  # slots behind a shared prefix
        self._group = integers(sizes.groups)
        self._waits = np.ones(alone.size, dtype=np.bool_)

    def take_oldest(self, bin_length: int) -> tuple[list[int], int]:
        """Take the oldest documents while they fit; return them and the slots left."""
        oldest = np.flatnonzero(self._waits)
        sizes = self._sizes_in_order(oldest)
        filled = np.cumsum(sizes)
        num_taken = _count_fitting(filled, bin_length)
        if num_taken == 0:
            return [], bin_length
        chosen = oldest[:num_taken]
        self._waits[chosen] = False
        last = num_taken - 1
        num_filled = int(filled[last])
        num_free = bin_length - num_filled
        return chosen.tolist(), num_free

    def _sizes_in_order(
        self,
        documents: IntArray,  # [N] numbers
    ) -> IntArray:  # [N]
        """Return the slots of each document behind those before it."""
        group = self._group[documents]
        behind = self._behind[documents]
        alone = self._alone[documents]
        follows = np.zeros(documents.size, dtype=np.bool_)  # another document of its group
        is_same = group[1:] == group[:-1]
        follows[1:] = is_same
        return np.where(follows, behind, alone)

    def fill_gap(self, num_free: int, chosen: list[int]) -> list[int]:
        """Take the longest that fits, again and again, into a bin that holds ``chosen``."""
        groups_here = self._group[chosen]
        group_is_here = np.isin(self._group, groups_here)
        taken: list[int] = []
        while True:
            sizes = np.where(group_is_here, self._behind, self._alone)
            fits = sizes <= num_free
            can_go = self._waits & fits
            candidates = np.where(can_go, sizes, 0)
            if not candidates.any():
                return taken
            longest = int(candidates.argmax())
            taken.append(longest)
            self._waits[longest] = False
            size = int(sizes[longest])
            num_free -= size
            group = self._group[longest]
            group_is_here |= self._group == group
