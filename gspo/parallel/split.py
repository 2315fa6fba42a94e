"""Cut packed batches over the ranks of a context axis, and collect what they computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gspo.parallel.balance import assign_slots
from gspo.parallel.context import ContextAxis
from gspo.types import Axis, PackedBatch, field_specs


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of a packed batch, and how the parts of all ranks lie."""

    whole: PackedBatch
    part: PackedBatch  # R bins of S / C slots; what is per document is that of the whole
    slots: Tensor  # [C, R, S / C] int64, the slot in its bin, for every slot of every rank
    rank: int

    @property
    def counted(self) -> Tensor | None:  # [D] bool
        """Documents whose sums are added up on this rank, of those on several; None: all."""
        size = self.slots.shape[0]
        if size == 1:
            return None
        documents = torch.arange(self.whole.label_counts.numel())
        return documents % size == self.rank

    @property
    def order(self) -> Tensor:  # [R, S] int64
        """The slot in its bin of every key that attention gathers."""
        return self.slots.transpose(0, 1).flatten(1)

    def collect(self, values: Tensor, axis: ContextAxis | None) -> Tensor:  # [R * S / C] -> [T]
        """Return the values of all ranks in the order of the whole, without gradients.

        Collective over the axis.
        """
        if axis is None or axis.size == 1:
            return values
        by_rank = axis.gather(values).view(self.slots.shape)
        by_bin = by_rank.transpose(0, 1).flatten(1)
        order = self.order.to(values.device)
        whole = torch.empty_like(by_bin).scatter_(1, order, by_bin)
        return whole.flatten()


def split(batch: PackedBatch, axis: ContextAxis | None) -> Shard:
    """Return this rank's part of a batch on the CPU, the whole of it where the axis has one rank.

    Bins whose length is not a multiple of the axis' size are padded.
    """
    if axis is None or axis.size == 1:
        slots = torch.arange(batch.bin_length)
        slots = slots.expand(1, batch.num_bins, batch.bin_length)
        return Shard(batch, batch, slots, rank=0)
    missing = -batch.bin_length % axis.size
    whole = _padded(batch, missing)
    positions = whole.positions.view(whole.num_bins, -1)
    assigned = assign_slots(positions.numpy() + 1, axis.size)
    slots = torch.from_numpy(assigned)
    starts = whole.bin_length * torch.arange(whole.num_bins)
    mine = slots[axis.rank] + starts[:, None]
    mine = mine.flatten()
    part = whole.map(lambda _, values: values[mine], Axis.SLOT)
    return Shard(whole, part, slots, axis.rank)


def _padded(batch: PackedBatch, num_slots: int) -> PackedBatch:
    """Return the batch with ``num_slots`` more of the padding document at the end of each bin."""
    if not num_slots:
        return batch
    specs = field_specs(PackedBatch)

    def pad(name: str, values: Tensor) -> Tensor:
        value = 0
        if specs[name].numbers == Axis.DOCUMENT:
            value = batch.padding_document
        bins = values.view(batch.num_bins, -1)
        padded = F.pad(bins, (0, num_slots), value=value)
        return padded.flatten()

    return batch.map(pad, Axis.SLOT)
