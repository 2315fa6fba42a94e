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
FloatArray = np.ndarray[Any, np.dtype[np.float64]]

MULTIPLE = 8  # the length of bins that are fitted to documents, for fewer distinct shapes
# Slots of a bin whose dense mask costs as much as all else that its slots cost. Measured by
# benchmarks/bins.py: 580 for a model of 0.5 M parameters, 2,200 for one of 135 M; by its products
# one of 1 B has 19,000. What one number for all costs is in benchmarks/results/README.md.
EVEN_LENGTH = 3000
# Bins this full are taken for up to so much more than the cheapest: they also hold less memory.
FULL = 0.93
MAX_EXTRA = 1.07


@dataclass(frozen=True, slots=True)
class DocumentSizes:
    """The sizes of several documents in slots; documents of one group stand next to each other."""

    slots: list[int]  # that each takes alone
    shareable: list[int]  # those of them that hold the prefix it can share with its group
    groups: list[int]  # the group's number

    def first(self, num_documents: int) -> DocumentSizes:
        """Return the sizes of the first documents alone."""
        until = slice(num_documents)
        return DocumentSizes(self.slots[until], self.shareable[until], self.groups[until])

    def in_order(self) -> list[int]:
        """Return the slots that each adds to those before it: a group brings its prefix once."""
        added = []
        seen: set[int] = set()
        for document, group in enumerate(self.groups):
            num_slots = self.slots[document]
            if group in seen:
                num_slots -= self.shareable[document]
            seen.add(group)
            added.append(num_slots)
        return added


@dataclass(slots=True)
class Unit:
    """Documents of one group that stand behind one copy of their prefix."""

    prefix: int  # slots
    num_slots: int  # of the prefix and all documents
    documents: list[int] = field(default_factory=list)  # their numbers
    behind: list[int] = field(default_factory=list)  # slots of each behind the prefix

    @classmethod
    def empty(cls, prefix: int) -> Unit:
        """Return a unit of a prefix alone."""
        return cls(prefix, prefix)

    def add(self, document: int, behind: int) -> None:
        """Put a document behind the prefix."""
        self.documents.append(document)
        self.behind.append(behind)
        self.num_slots += behind


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

    @property
    def cost(self) -> float:
        """The cost under a dense mask, see :func:`dense_cost`."""
        return dense_cost(self.num_slots, self.length)


def dense_cost(num_slots: Any, length: Any) -> Any:
    """Estimate the cost of bins under a dense mask, in slots that attend to nothing.

    A mask costs ``length`` pairs for each slot; all else costs the same for each.

    Args:
        num_slots: of all bins, a number or an array.
        length: of a bin, likewise.
    """
    pairs = length / EVEN_LENGTH
    return num_slots * (1 + pairs)


def integers(values: list[int]) -> IntArray:
    """Return the values as an array of int64."""
    return np.array(values, dtype=np.int64)


def best_fit(slots: list[int], bin_length: int) -> list[int]:
    """Return the bin of each item: longest first, each into the fullest bin that takes it.

    Args:
        slots: of each item, none of them longer than a bin.
        bin_length: S.
    """
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


def whole_groups(sizes: DocumentSizes) -> list[Unit]:
    """Return one unit for each group, with all its documents."""
    units: dict[int, Unit] = {}
    for document, group in enumerate(sizes.groups):
        prefix = sizes.shareable[document]
        if group not in units:
            units[group] = Unit.empty(prefix)
        behind = sizes.slots[document] - prefix
        units[group].add(document, behind)
    return list(units.values())


def fill_bins(groups: list[Unit], length: int) -> Bins:
    """Put groups into bins by best fit, whole ones where they fit into a bin.

    Args:
        groups: with all documents from 0 on.
        length: of a bin.

    Raises:
        ValueError: A document is longer than a bin.
    """
    units: list[Unit] = []
    for group in groups:
        units += _split(group, length)
    unit_slots = [unit.num_slots for unit in units]
    bin_of_unit = best_fit(unit_slots, length)
    num_documents = sum(len(unit.documents) for unit in units)
    bin_of = [0] * num_documents
    for unit, number in zip(units, bin_of_unit, strict=True):
        for document in unit.documents:
            bin_of[document] = number
    return Bins(length, bin_of)


def _split(group: Unit, length: int) -> list[Unit]:
    """Split a group into parts that each fit into a bin, each with a copy of the prefix."""
    if group.num_slots <= length:
        return [group]
    longest = group.prefix + max(group.behind)
    if longest > length:
        raise ValueError(
            f"a document takes {longest} slots, more than bin_length {length}; raise it"
        )
    part_of = best_fit(group.behind, length - group.prefix)
    num_parts = max(part_of) + 1
    parts = [Unit.empty(group.prefix) for _ in range(num_parts)]
    for document, behind, number in zip(group.documents, group.behind, part_of, strict=True):
        parts[number].add(document, behind)
    return parts


def cheapest_bins(sizes: DocumentSizes, max_length: int | None = None) -> Bins:
    """Return the bins that cost least under a dense mask, see :func:`dense_cost`.

    All multiples of 8 are tried as their length. Longer bins hold more of a group behind one prefix
    and less padding, and cost more for the mask. Of bins that cost up to 7 % more than the
    cheapest, those at least 93 % full of needed slots are taken, the cheapest of them first.

    Args:
        sizes: of the documents.
        max_length: an upper limit, at least the longest document; None: that of one bin for all.
    """
    groups = whole_groups(sizes)
    num_needed = sum(group.num_slots for group in groups)
    limit = max_length or _round_up(max(1, num_needed))
    longest = max([1, *sizes.slots])
    shortest = min(_round_up(longest), limit)
    lengths = np.arange(shortest, limit + 1, MULTIPLE)
    near = _near_cheapest(groups, lengths)
    full = [bins for bins in near if num_needed >= FULL * bins.num_slots]
    return min(full or near, key=lambda bins: bins.cost)


def _near_cheapest(
    groups: list[Unit],
    lengths: IntArray,  # [L] ascending, the first at least the longest document
) -> list[Bins]:
    """Return the bins that cost at most ``MAX_EXTRA`` times what the cheapest do."""
    group_slots = [group.num_slots for group in groups]
    holds_groups = lengths >= max(group_slots, default=0)
    guess = lengths[holds_groups.argmax()] if holds_groups.any() else lengths[-1]
    tried = [fill_bins(groups, int(guess))]
    ceiling = MAX_EXTRA * tried[0].cost
    may_be_near = dense_cost(sum(group_slots), lengths) <= ceiling
    lengths = lengths[may_be_near]
    bounds = lower_bounds(groups, lengths)
    for i in np.argsort(bounds, kind="stable"):
        if bounds[i] > ceiling:
            break
        bins = fill_bins(groups, int(lengths[i]))
        tried.append(bins)
        ceiling = min(ceiling, MAX_EXTRA * bins.cost)
    return [bins for bins in tried if bins.cost <= ceiling]


def lower_bounds(
    groups: list[Unit],
    lengths: IntArray,  # [L], each at least the longest document
) -> FloatArray:  # [L]
    """Return what bins of each length cost at least: each part of a group needs a prefix."""
    prefix = integers([group.prefix for group in groups])
    num_slots = integers([group.num_slots for group in groups])
    behind = num_slots - prefix
    room = lengths[:, None] - prefix
    num_parts = np.ceil(behind / room)
    num_needed = (behind + num_parts * prefix).sum(1)
    num_bins = np.ceil(num_needed / lengths)
    return dense_cost(num_bins * lengths, lengths)


def _round_up(length: int) -> int:
    num_multiples = math.ceil(length / MULTIPLE)
    return num_multiples * MULTIPLE


def take_short_bins(sizes: DocumentSizes, max_slots: int, max_length: int) -> Bins:
    """Fill the cheapest bins with as many documents from the front as ``max_slots`` slots take.

    Args:
        sizes: of the documents, the oldest first.
        max_slots: of all bins together.
        max_length: of a bin, at most ``max_slots``.

    Returns:
        The bins of the documents taken.
    """
    added = sizes.in_order()
    filled = np.cumsum(added)
    num_taken = _count_fitting(filled, max_slots)
    while True:
        taken = sizes.first(num_taken)
        bins = cheapest_bins(taken, max_length)
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

    Documents come in order of age while they fit, then those that fit into the gap, the longest
    behind its prefix first. A document whose group is in the bin already does not bring its prefix
    again.

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
        """Take what is longest behind its prefix and fits, again and again, into a bin.

        Args:
            num_free: slots of the gap.
            chosen: the documents that the bin holds.
        """
        groups_here = self._group[chosen]
        group_is_here = np.isin(self._group, groups_here)
        taken: list[int] = []
        while True:
            sizes = np.where(group_is_here, self._behind, self._alone)
            fits = sizes <= num_free
            can_go = self._waits & fits
            candidates = np.where(can_go, self._behind, 0)
            if not candidates.any():
                return taken
            longest = int(candidates.argmax())
            taken.append(longest)
            self._waits[longest] = False
            size = int(sizes[longest])
            num_free -= size
            group = self._group[longest]
            group_is_here |= self._group == group
