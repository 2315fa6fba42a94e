"""Attention of packed documents: their mask, and keys gathered over context ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torchtune.modules import TransformerDecoder

from gspo.compat import all_gather_with_gradient
from gspo.errors import InputError
from gspo.parallel.context import ContextAxis
from gspo.parallel.split import Shard
from gspo.types import PackedBatch

AttentionMask = Tensor | BlockMask | None


def document_mask(shard: Shard, device: torch.device) -> AttentionMask:
    """Build the mask of causal attention inside each document and to its prefix.

    It is a FlexAttention block mask on CUDA, else [R, S / C, S] bool. Keys come in the shard's
    ``order``. None, for plain causal attention, where no bin holds two documents.
    """
    num_ranks, num_bins, share = shard.slots.shape
    if num_ranks == 1 and _one_document_per_bin(shard.whole):
        return None
    if device.type == "cuda":
        function = mask_mod(shard, device)
        return create_block_mask(function, num_bins, None, share, share * num_ranks, device=device)
    layout = _Layout.of(shard, device)
    key_slots = layout.kv_slot[:, None, :]
    key_documents = layout.kv_document[:, None, :]
    is_before = layout.q_slot[:, :, None] >= key_slots
    in_document = layout.q_document[:, :, None] == key_documents
    in_prefix = layout.q_prefix[:, :, None] == key_documents
    return is_before & (in_document | in_prefix)


def mask_mod(
    shard: Shard, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
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

    return is_seen


@dataclass(frozen=True, slots=True)
class _Layout:
    """The slots and documents of this rank's queries and of all keys, on the device."""

    q_slot: Tensor  # [R, S / C]
    q_document: Tensor  # [R, S / C]
    q_prefix: Tensor  # [R, S / C]
    kv_slot: Tensor  # [R, S]
    kv_document: Tensor  # [R, S]

    @classmethod
    def of(cls, shard: Shard, device: torch.device) -> _Layout:
        """Compute the layout from a shard."""
        batch = shard.whole
        mine, order = shard.slots[shard.rank], shard.order
        document = batch.document_index.view(batch.num_bins, -1)
        prefix = document
        if batch.prefix_index is not None:
            prefix = batch.prefix_index[document]
        return cls(
            q_slot=mine.to(device),
            q_document=document.gather(1, mine).to(device),
            q_prefix=prefix.gather(1, mine).to(device),
            kv_slot=order.to(device),
            kv_document=document.gather(1, order).to(device),
        )


def _one_document_per_bin(batch: PackedBatch) -> bool:
    """Whether no bin holds two documents; the causal mask alone is then exact.

    What padding sees does not matter.
    """
    index = batch.document_index.view(batch.num_bins, -1)
    before, after = index[:, :-1], index[:, 1:]
    is_start = after != before
    is_start &= after != batch.padding_document
    return not is_start.any()


def gather_keys(decoder: TransformerDecoder, axis: ContextAxis) -> None:
    """Let every layer of ``decoder`` attend to the keys and values of all ranks of the axis.

    Masks then are [S / C, S]: keys come rank by rank, as the rows of a shard's ``slots`` do.

    Raises:
        InputError: A layer has an attention of its own.
    """
    for layer in decoder.layers:
        attention = layer.attn
        if not hasattr(attention, "_attention_call"):
            raise InputError(
                "model",
                type(attention).__name__,
                "cannot gather keys, which context_parallel_size above 1 asks for",
                "set that to 1, or build a model with torchtune's MultiHeadAttention",
            )
        repeats = attention.num_heads // attention.num_kv_heads
        attention._attention_call = _gathered(attention._attention_call, repeats, axis)


def _gathered(
    attend: Callable[..., Tensor], repeats: int, axis: ContextAxis
) -> Callable[..., Tensor]:
    group, size = axis.group, axis.size

    def attend_to_all(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | BlockMask,
        dropout_p: float,
        is_causal: bool,
    ) -> Tensor:
        # Heads of keys and values come repeated to those of queries; one of each travels.
        mine = torch.stack((k[:, ::repeats], v[:, ::repeats]))  # [2, R, heads, S / C, head_dim]
        gathered = all_gather_with_gradient(mine, 0, group)
        by_rank = gathered.view(size, *mine.shape)
        keys, values = by_rank.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        if isinstance(mask, BlockMask):
            keys = keys.repeat_interleave(repeats, 1)
            values = values.repeat_interleave(repeats, 1)
            return attend(q, keys, values, mask=mask, dropout_p=dropout_p, is_causal=is_causal)
        # Not repeated, they are kept for the backward once.
        return F.scaled_dot_product_attention(
            q, keys, values, mask[:, None], dropout_p, enable_gqa=repeats > 1
        )

    return attend_to_all
