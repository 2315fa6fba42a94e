"""Attention of packed documents: masks, and keys gathered over context ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torchtune.modules import TransformerDecoder

from gspo.errors import InputError
from gspo.parallel.context import ContextAxis, Shard
from gspo.types import PackedBatch

# Differentiable, and known to torch.compile; torch 2.13 has it by a new name.
_all_gather = (
    getattr(collectives, "all_gather_single_autograd", None)
    or collectives.all_gather_tensor_autograd
)


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
        found = _all_gather(mine, 0, group).view(size, *mine.shape)
        keys, values = found.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        if isinstance(mask, BlockMask):
            keys, values = (x.repeat_interleave(repeats, 1) for x in (keys, values))
            return attend(q, keys, values, mask=mask, dropout_p=dropout_p, is_causal=is_causal)
        # Not repeated, they are kept for the backward once.
        return F.scaled_dot_product_attention(
            q, keys, values, mask[:, None], dropout_p, enable_gqa=repeats > 1
        )

    return attend_to_all


AttentionMask = Tensor | BlockMask | None


def document_mask(shard: Shard, device: torch.device) -> AttentionMask:
    """Causal attention inside each document and to its prefix: a FlexAttention block mask on CUDA, else [R, S / C, S].

    Keys come in the shard's ``order``. None, for plain causal attention, where no bin holds two documents.
    """
    num_ranks, num_bins, share = shard.places.shape
    if num_ranks == 1 and _one_document_per_bin(shard.whole):
        return None
    if device.type == "cuda":
        return create_block_mask(
            mask_mod(shard, device), num_bins, None, share, share * num_ranks, device=device
        )
    q_place, q_index, q_prefix, kv_place, kv_index = _layout(shard, device)
    causal = q_place[:, :, None] >= kv_place[:, None, :]
    own = q_index[:, :, None] == kv_index[:, None, :]
    return causal & (own | (q_prefix[:, :, None] == kv_index[:, None, :]))


def mask_mod(
    shard: Shard, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as FlexAttention asks for it."""
    q_place, q_index, q_prefix, kv_place, kv_index = _layout(shard, device)

    def seen(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        key = kv_index[b, kv]
        return (q_place[b, q] >= kv_place[b, kv]) & (
            (q_index[b, q] == key) | (q_prefix[b, q] == key)
        )

    return seen


def _layout(shard: Shard, device: torch.device) -> tuple[Tensor, ...]:
    """Place, document and prefix of this rank's queries, [R, S / C]; place and document of all keys, [R, S]."""
    batch, mine, order = shard.whole, shard.places[shard.rank], shard.order
    index = batch.document_index.view(batch.num_bins, -1)
    prefix = index if batch.prefix_index is None else batch.prefix_index[index]
    found = mine, index.gather(1, mine), prefix.gather(1, mine), order, index.gather(1, order)
    return tuple(x.to(device) for x in found)


def _one_document_per_bin(batch: PackedBatch) -> bool:
    """True if no bin holds two documents; the causal mask alone is then exact, whatever padding sees."""
    index = batch.document_index.view(batch.num_bins, -1)
    starts = (index[:, 1:] != index[:, :-1]) & (index[:, 1:] != batch.label_counts.numel() - 1)
    return not starts.any()
