"""The address space of a GPU's allocator, for the gaps that blocks of memory leave between them."""

from __future__ import annotations

from bisect import bisect_left, insort

_UNIT = 512  # bytes that sizes are rounded up to


class Arena:
    """One segment that grows, as torch's ``expandable_segments`` have it.

    A block goes into the smallest gap that holds it, else to the end; gaps side by side are one.
    Blocks are not moved, so the segment can be longer than the blocks in it ever were together.
    torch keeps a segment for each stream and one for small blocks; here all share one.
    """

    def __init__(self) -> None:
        self.end = 0  # the most that was reserved
        self._sizes: dict[int, int] = {}  # by address
        self._gaps: list[tuple[int, int]] = []  # size and address, ascending
        self._gap_at: dict[int, int] = {}  # address -> size
        self._gap_before: dict[int, int] = {}  # address of its end -> size

    def take(self, num_bytes: int) -> int:
        """Reserve a block and return its address."""
        size = -(-num_bytes // _UNIT) * _UNIT
        place = bisect_left(self._gaps, (size, 0))
        if place < len(self._gaps):
            gap, address = self._gaps[place]
            self._remove_gap(address)
            if gap > size:
                self._add_gap(address + size, gap - size)
        else:
            address = self.end
            last = self._gap_before.get(self.end, 0)
            if last:  # the gap at the end grows
                address = self.end - last
                self._remove_gap(address)
            self.end = address + size
        self._sizes[address] = size
        return address

    def give(self, address: int) -> None:
        """Free the block at an address."""
        size = self._sizes.pop(address)
        before = self._gap_before.get(address, 0)
        if before:
            address -= before
            self._remove_gap(address)
            size += before
        after = self._gap_at.get(address + size, 0)
        if after:
            self._remove_gap(address + size)
            size += after
        self._add_gap(address, size)

    def _add_gap(self, address: int, size: int) -> None:
        insort(self._gaps, (size, address))
        self._gap_at[address] = size
        self._gap_before[address + size] = size

    def _remove_gap(self, address: int) -> None:
        size = self._gap_at.pop(address)
        del self._gap_before[address + size]
        place = bisect_left(self._gaps, (size, address))
        del self._gaps[place]
