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

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from torchdata.nodes import BaseNode
from torchtune.modules import TransformerDecoder

from gspo.errors import InputError
from gspo.types import PackedBatch

# Differentiable, and known to torch.compile; torch 2.13 has it by a new name.
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd

IntArray = np.ndarray[Any, np.dtype[np.int64]]

_LARGEST_BLOCK = 128  # places dealt together: what FlexAttention skips or computes together
_MIN_BLOCKS = 8  # of a rank and bin, so that heavy and light ones can be paired


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


class ShareOverContext(BaseNode[PackedBatch]):
    """Microbatches that the first rank of a context axis draws, on every rank of it.

    Args:
        source: where they are drawn; None on the other ranks.
        axis: the context axis.
    """

    def __init__(self, source: BaseNode[PackedBatch] | None, axis: ContextAxis) -> None:
        super().__init__()
        self.source, self.axis = source, axis

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on from a state."""
        super().reset(initial_state)
        if self.source is not None:
            self.source.reset(None if initial_state is None else initial_state["source"])

    def get_state(self) -> dict[str, Any]:
        """The source's state, None where there is no source."""
        return {"source": None if self.source is None else self.source.state_dict()}

    def next(self) -> PackedBatch:
        """The next microbatch. Collective over the axis."""
        batch = self.axis.share(None if self.source is None else next(self.source, None))
        if batch is None:
            raise StopIteration
        return batch


def assign_places(
    num_keys: IntArray,  # [R, S], places that each attends to
    size: int,
) -> IntArray:  # [C, R, S / C], ascending
    """Deals the places of each bin to ``size`` ranks, as many to each, with about the same attention work.

    Blocks of places are dealt round by round, heaviest first, and in a round the rank with the least work so far gets
    the heaviest. Work is counted as FlexAttention does it, in whole blocks of keys: on bins of 8,192 places with
    log-normal documents (median 400, longest 4,096) the heaviest of 8 ranks has 2.4 % more than the mean, of 4 ranks
    0.8 %, and together they have no block more than one rank would.

    Args:
        num_keys: its document's and its prefix', up to and with itself.
        size: C, which divides S.
    """
    num_bins, length = num_keys.shape
    block = _block_length(length // size)
    # FlexAttention computes whole blocks of keys: those from the first that any query of a block attends to.
    first_key = (np.arange(length) + 1 - num_keys).reshape(num_bins, -1, block).min(-1)
    work = np.arange(length // block) - first_key // block + 1
    heaviest = np.argsort(-work, axis=1, kind="stable")
    rank_of = np.empty_like(heaviest)
    so_far = np.zeros((num_bins, size), dtype=np.int64)
    for start in range(0, heaviest.shape[1], size):
        blocks = heaviest[:, start : start + size]
        ranks = np.argsort(so_far, axis=1, kind="stable")
        np.put_along_axis(rank_of, blocks, ranks, axis=1)
        found = np.take_along_axis(so_far, ranks, 1) + np.take_along_axis(work, blocks, 1)
        np.put_along_axis(so_far, ranks, found, axis=1)
    blocks = np.argsort(rank_of, axis=1, kind="stable").reshape(num_bins, size, -1)
    places = blocks[..., None] * block + np.arange(block)
    return places.reshape(num_bins, size, -1).transpose(1, 0, 2)


def _block_length(share: int) -> int:
    """The largest power of two that divides a rank's share of a bin and leaves it blocks to be dealt."""
    block = 1
    while block < _LARGEST_BLOCK and share % (2 * block) == 0 and share >= 2 * block * _MIN_BLOCKS:
        block *= 2
    return block


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
        return None if size == 1 else torch.arange(self.whole.label_counts.numel()) % size == self.rank

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
    changed: dict[str, Any] = {name: change(name, value) for name, value in values.items() if value is not None}
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


def gather_keys(decoder: TransformerDecoder, axis: ContextAxis) -> None:
    """Lets every layer of ``decoder`` attend to the keys and values of all ranks of the axis.

    Masks then are [S / C, S]: keys come rank by rank, as the rows of ``places`` do.

    Raises:
        InputError: a layer has an attention of its own.
    """
    for layer in decoder.layers:
        attention = layer.attn
        if not hasattr(attention, "_attention_call"):
            raise InputError(
                f"model: {type(attention).__name__} cannot gather keys, which context_parallel_size above 1 asks for: "
                "set that to 1, or build a model with torchtune's MultiHeadAttention."
            )
        repeats = attention.num_heads // attention.num_kv_heads
        attention._attention_call = _gathered(attention._attention_call, repeats, axis)


def _gathered(attend: Callable[..., Tensor], repeats: int, axis: ContextAxis) -> Callable[..., Tensor]:
    group, size = axis.group, axis.size

    def attend_to_all(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | BlockMask, dropout_p: float, is_causal: bool
    ) -> Tensor:
        # Heads of keys and values come repeated to those of queries; one of each travels.
        mine = torch.stack((k[:, ::repeats], v[:, ::repeats]))  # [2, R, heads, S / C, head_dim]
        found = _all_gather(mine, 0, group).view(size, *mine.shape)
        keys, values = found.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        if isinstance(mask, BlockMask):
            keys, values = (x.repeat_interleave(repeats, 1) for x in (keys, values))
            return attend(q, keys, values, mask=mask, dropout_p=dropout_p, is_causal=is_causal)
        # Not repeated, they are kept for the backward once.
        return F.scaled_dot_product_attention(q, keys, values, mask[:, None], dropout_p, enable_gqa=repeats > 1)

    return attend_to_all
