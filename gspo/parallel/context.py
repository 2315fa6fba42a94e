"""Context parallelism: the places of a microbatch are split over ranks, and a document may lie on several of them.

Only three things notice. Attention gathers keys and values over the axis, which grouped-query attention keeps small;
an objective completes its sums per document; and the microbatch is drawn by one rank and handed to the others. The
model's definition does not change, and any number of heads will do.

Not here: what is split (:class:`gspo.policy.Microbatch`), the mesh (:mod:`gspo.parallel`). torch's own context
parallelism is for one causal sequence or for FlexAttention alone, and knows no prefix that documents share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from gspo.parallel.balance import assign_places
from gspo.types import PackedBatch


@dataclass(frozen=True, slots=True)
class ContextAxis:
    """The ranks that hold the places of one microbatch."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> ContextAxis:
        """The axis ``context`` of a mesh of :func:`gspo.parallel.build_mesh`."""
        axis = mesh["context"]
        return cls(axis.get_group(), axis.get_local_rank(), axis.size())

    def complete(self, sums: Tensor) -> Tensor:
        """Adds up what the ranks have; the gradient goes to this rank's part as it comes."""
        return _SumOverRanks.apply(sums, self.group)

    def gather(self, values: Tensor) -> Tensor:  # [...] -> [C, ...]
        """The tensors of all ranks, without gradients."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(found, values.detach().contiguous(), group=self.group)
        return torch.stack(found)

    def share(self, value: Any) -> Any:
        """What the first rank of the axis has, on all of them; it must pickle."""
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0, device=torch.device("cpu"))
        return box[0]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = sums.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of a packed batch, and how all parts lie."""

    whole: PackedBatch
    part: PackedBatch  # R bins of S / C places; what is per document is that of the whole
    places: Tensor  # [C, R, S / C] int64, place in its bin, for every place of every rank
    rank: int

    @property
    def counted(self) -> Tensor | None:  # [D] bool
        """Documents whose sums are added up on this rank, of those that lie on several; None: all."""
        size = self.places.shape[0]
        return (
            None if size == 1 else torch.arange(self.whole.label_counts.numel()) % size == self.rank
        )

    @property
    def order(self) -> Tensor:  # [R, S] int64
        """The place in its bin of every key that attention gathers."""
        return self.places.transpose(0, 1).flatten(1)

    def collect(self, values: Tensor, axis: ContextAxis | None) -> Tensor:  # [R * S / C] -> [T]
        """The values of all ranks in the order of the whole, without gradients. Collective over the axis."""
        if axis is None or axis.size == 1:
            return values
        found = axis.gather(values).view(self.places.shape).transpose(0, 1).flatten(1)
        return torch.empty_like(found).scatter_(1, self.order.to(values.device), found).flatten()


def split(batch: PackedBatch, axis: ContextAxis | None) -> Shard:
    """This rank's part of a batch on the CPU: the whole of it without an axis or on one of size 1.

    Bins whose length is not a multiple of the axis' size are padded.
    """
    if axis is None or axis.size == 1:
        places = torch.arange(batch.bin_length).expand(1, batch.num_bins, batch.bin_length)
        return Shard(batch, batch, places, rank=0)
    whole = _padded(batch, -batch.bin_length % axis.size)
    num_keys = whole.positions.view(whole.num_bins, -1).numpy() + 1
    places = torch.from_numpy(assign_places(num_keys, axis.size))
    mine = (places[axis.rank] + whole.bin_length * torch.arange(whole.num_bins)[:, None]).flatten()
    return Shard(whole, _per_token(whole, lambda name, values: values[mine]), places, axis.rank)


_OF_TOKENS = (
    "tokens",
    "labels",
    "positions",
    "document_index",
    "loss_mask",
    "old_logps",
    "ref_logps",
    "sampler_logps",
    "segment_index",
)


def _per_token(batch: PackedBatch, change: Callable[[str, Tensor], Tensor]) -> PackedBatch:
    """A batch with what it has per token changed."""
    values = {name: getattr(batch, name) for name in _OF_TOKENS}
    changed: dict[str, Any] = {
        name: change(name, value) for name, value in values.items() if value is not None
    }
    return replace(batch, **changed)


def _padded(batch: PackedBatch, num_places: int) -> PackedBatch:
    """``num_places`` more of the padding document at the end of each bin."""
    if not num_places:
        return batch
    padding_document = batch.label_counts.numel() - 1

    def pad(name: str, values: Tensor) -> Tensor:
        value = padding_document if name == "document_index" else 0
        return F.pad(values.view(batch.num_bins, -1), (0, num_places), value=value).flatten()

    return _per_token(batch, pad)
