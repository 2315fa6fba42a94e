"""The attention of every layer, and keys gathered over context ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torchtune.modules import TransformerDecoder

from gspo.compat import all_gather_with_gradient, has_attention, set_attention
from gspo.errors import InputError
from gspo.parallel.context import ContextAxis
from gspo.policy.mask import AttentionMask

Attend = Callable[..., Tensor]  # with the arguments of ``attend``


def attend(
    q: Tensor,  # [R, heads, queries, head_dim]
    k: Tensor,  # [R, heads, keys, head_dim]
    v: Tensor,
    *,
    mask: AttentionMask,
    dropout_p: float,
    is_causal: bool,
) -> Tensor:  # [R, heads, queries, head_dim]
    """Attend under a mask of :func:`gspo.policy.document_mask`, by FlexAttention if in blocks.

    Raises:
        InputError: The model has a dropout of attention, which FlexAttention does not.
    """
    if not isinstance(mask, BlockMask):
        dense = None if mask is None else mask[:, None]
        return F.scaled_dot_product_attention(q, k, v, dense, dropout_p, is_causal)
    if dropout_p > 0:
        raise InputError(
            "model.attn_dropout",
            dropout_p,
            "is not 0, and FlexAttention has no dropout",
            "set it to 0",
        )
    return _attend_in_blocks(q, k, v, mask)


# Compiled on CUDA and nowhere else, whether the layer around it is or not.
@torch.compiler.disable(recursive=False)
def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    function = _flex_attention(is_compiled=q.is_cuda)
    return function(q, k, v, block_mask=mask)


@cache
def _flex_attention(*, is_compiled: bool) -> Any:
    if is_compiled:
        return torch.compile(flex_attention, dynamic=False)
    return torch.compiler.disable(flex_attention)


def use_attention(
    decoder: TransformerDecoder, axis: ContextAxis | None, function: Attend = attend
) -> None:
    """Let every layer of ``decoder`` attend with ``function``, over all ranks of an axis.

    With an axis masks are [S / C, S]: keys come rank by rank, as the rows of a shard's ``slots``
    do. A layer with an attention module of its own kind keeps it.

    Raises:
        InputError: There is an axis, and a layer has an attention of its own.
    """
    for layer in decoder.layers:
        attention = layer.attn
        if axis is None:
            if has_attention(layer):
                set_attention(layer, function)
            continue
        if not has_attention(layer):
            raise InputError(
                "model",
                type(attention).__name__,
                "cannot gather keys, which context_parallel_size above 1 asks for",
                "set that to 1, or build a model with torchtune's MultiHeadAttention",
            )
        repeats = attention.num_heads // attention.num_kv_heads
        set_attention(layer, _gathered(function, repeats, axis))


def _gathered(function: Attend, repeats: int, axis: ContextAxis) -> Attend:
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
            return function(q, keys, values, mask=mask, dropout_p=dropout_p, is_causal=is_causal)
        # Not repeated, they are kept for the backward once.
        return F.scaled_dot_product_attention(
            q, keys, values, mask[:, None], dropout_p, enable_gqa=repeats > 1
        )

    return attend_to_all
