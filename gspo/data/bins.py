"""Which bin each item goes into, by sizes alone.

Not here: documents and tensors, see :mod:`gspo.data.packing`.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

MULTIPLE = (
    8  # bins as long as their longest document are rounded up to this, for fewer distinct shapes
)
SHORT_BIN = 64  # up to here a dense mask costs next to nothing, so bins may be longer than their longest document
_FULL_ENOUGH = 0.95


def share_prefixes(
    places: list[int], prefixes: list[int], groups: list[int], max_places: int
) -> tuple[list[list[int]], list[int]]:
    """Documents of one group that stand behind one copy of their prefix, for bins with a dense mask.

    As many together as keep the square of their places, which such a mask costs, no larger than apart; up to 64 places
    it costs next to nothing.

    Args:
        places: of each document alone.
        prefixes: of those, the places that it can share with its group.
        groups: of each document, one group's next to each other.
        max_places: an upper limit for several together.

    Returns:
        The documents of each unit, and the places that it takes.
    """
    units: list[list[int]] = []
    sizes: list[int] = []
    square_apart = 0
    for document, (alone, prefix, group) in enumerate(zip(places, prefixes, groups, strict=True)):
        if units and groups[units[-1][0]] == group:
            together = sizes[-1] + alone - prefix
            cheap = together <= SHORT_BIN or together**2 <= square_apart + alone**2
            if cheap and together <= max_places:
                units[-1].append(document)
                sizes[-1] = together
                square_apart += alone**2
                continue
        units.append([document])
        sizes.append(alone)
        square_apart = alone**2
    return units, sizes


def best_fit(places: list[int], bin_length: int) -> list[int]:
    """The bin of each document: longest first, each into the fullest bin that takes it, else into a new one.

    Raises:
        ValueError: a document is longer than a bin.
    """
    if max(places, default=0) > bin_length:
        raise ValueError(
            f"a document takes {max(places)} places, more than bin_length {bin_length}; raise it"
        )
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
    limit = max_length or max([SHORT_BIN, *places]) + MULTIPLE
    shortest = min(-(-max([1, *places]) // MULTIPLE) * MULTIPLE, limit)
    best: tuple[int, list[int]] = shortest, best_fit(places, shortest)
    for length in range(shortest + MULTIPLE, min(SHORT_BIN, limit) + 1, MULTIPLE):
        if sum(places) >= _FULL_ENOUGH * _total_places(*best):
            break
        best = min(
            best, (length, best_fit(places, length)), key=lambda layout: _total_places(*layout)
        )
    return best


def take_short_bins(places: list[int], max_places: int, max_length: int) -> tuple[int, list[int]]:
    """As many items from the front as fit into ``max_places`` places of :func:`short_bins`.

    Returns:
        The bin length, and the bin of each item taken.
    """
    num_taken = int(np.searchsorted(np.cumsum(places), max_places, side="right"))
    while True:
        length, bin_of = short_bins(places[:num_taken], max_length)
        total = _total_places(length, bin_of)
        if total <= max_places:
            return length, bin_of
        num_taken = min(num_taken - 1, num_taken * max_places // total)


def take_long_bins(
    places: list[int], prefixes: list[int], groups: list[int], bin_length: int, max_bins: int
) -> tuple[list[int], list[int]]:
    """Fill up to ``max_bins`` bins in turn: documents in order of age while they fit, then the longest into the gap.

    A document whose group is in the bin already does not bring its prefix again.

    Args:
        places: of each document alone.
        prefixes: of those, the places that it can share with its group.
        groups: of each document, one group's next to each other.
        bin_length: S.
        max_bins: how many may be filled.

    Returns:
        Indices of the documents taken, and the bin of each.
    """
    alone, behind = np.array(places, dtype=np.int64), np.subtract(places, prefixes, dtype=np.int64)
    group = np.array(groups, dtype=np.int64)
    waiting = np.ones(alone.size, dtype=np.bool_)
    taken: list[int] = []
    bin_of: list[int] = []
    for current in range(max_bins):
        oldest = np.flatnonzero(waiting)
        follows = np.append(False, group[oldest[1:]] == group[oldest[:-1]])[: oldest.size]
        filled = np.cumsum(np.where(follows, behind[oldest], alone[oldest]))
        chosen = oldest[: np.searchsorted(filled, bin_length, side="right")].tolist()
        if not chosen:
            break
        waiting[chosen] = False
        space = bin_length - int(filled[len(chosen) - 1])
        here = np.isin(group, group[chosen])
        while True:
            sizes = np.where(here, behind, alone)
            fitting = np.where(waiting & (sizes <= space), sizes, 0)
            if not fitting.any():
                break
            longest = int(fitting.argmax())
            chosen.append(longest)
            waiting[longest] = False
            space -= int(sizes[longest])
            here |= group == group[longest]
        taken += chosen
        bin_of += [current] * len(chosen)
    return taken, bin_of


def _total_places(bin_length: int, bin_of: list[int]) -> int:
    return bin_length * (max(bin_of, default=0) + 1)
