"""The attention of every layer, and keys gathered over context ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from gspo.compat import all_gather_with_gradient, has_attention, set_attention
from gspo.errors import InputError
from gspo.parallel.context import ContextAxis
from gspo.policy.mask import AttentionMask

Attend = Callable[..., Tensor]  # with the arguments of ``attend``


def attend(
    q: Tensor,  # [R, heads, queries, head_dim]
    k: Tensor,  # [R, heads or key heads, keys, head_dim]
    v: Tensor,
    *,
    mask: AttentionMask,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:  # [R, heads, queries, head_dim]
    """Attend under a mask of :func:`gspo.policy.document_mask`, by FlexAttention if in blocks.

    Args:
        q: queries.
        k: keys; several heads of queries may share one.
        v: values.
        mask: in blocks, dense, or None.
        dropout_p: share of the weights that is dropped.
        is_causal: attend causally, where the mask is None.
        scale: factor of the scores; None for 1 / sqrt(head_dim).
        softcap: bound c of the scores, which become c * tanh(score / c); None for none.

    Raises:
        InputError: The model has a dropout of attention where it cannot be had.
    """
    is_grouped = q.shape[1] != k.shape[1]
    in_blocks = isinstance(mask, BlockMask)
    if dropout_p > 0 and (in_blocks or softcap is not None):
        raise InputError(
            "model.attn_dropout", dropout_p, "is not 0, and attention here has none", "set it to 0"
        )
    if isinstance(mask, BlockMask):
        return _attend_in_blocks(q, k, v, mask, scale, softcap, is_grouped)
    dense = None if mask is None else mask[:, None]
    if softcap is not None:
        return _attend_softcapped(q, k, v, dense, scale, softcap)
    return F.scaled_dot_product_attention(
        q, k, v, dense, dropout_p, is_causal, scale=scale, enable_gqa=is_grouped
    )


def _attend_softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """Attend with all scores at hand, since torch's fused attention has no softcap."""
    repeats = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(repeats, 1)
    values = v.repeat_interleave(repeats, 1)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ keys.transpose(-1, -2) * factor
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    # Not -inf: a row that sees no key would be NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ values


# Compiled on CUDA and nowhere else, whether the layer around it is or not.
@torch.compiler.disable(recursive=False)
def _attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float | None,
    softcap: float | None,
    is_grouped: bool,
) -> Tensor:
    function = _flex_attention(is_compiled=q.is_cuda)
    score_mod = None if softcap is None else _softcap_mod(softcap)
    return function(
        q, k, v, score_mod=score_mod, block_mask=mask, scale=scale, enable_gqa=is_grouped
    )


@cache
def _softcap_mod(softcap: float) -> Callable[..., Tensor]:
    """Return the softcap in the form that FlexAttention asks for."""

    def cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@cache
def _flex_attention(*, is_compiled: bool) -> Any:
    if is_compiled:
        return torch.compile(flex_attention, dynamic=False)
    return torch.compiler.disable(flex_attention)


def use_attention(decoder: Any, axis: ContextAxis | None, function: Attend = attend) -> None:
    """Let every layer of a decoder attend with ``function``, over all ranks of an axis.

    With an axis masks are [S / C, S]: keys come rank by rank, as the rows of a shard's ``slots``
    do. A layer with an attention module of its own kind keeps it.

    Args:
        decoder: torchtune's, or one that has a method of this name.
        axis: the ranks that documents span; None where they are whole.
        function: with the arguments of :func:`attend`.

    Raises:
        InputError: There is an axis, and a layer has an attention of its own.
    """
    if axis is not None:
        function = over_ranks(function, axis)
    if hasattr(decoder, "use_attention"):
        decoder.use_attention(function)
        return
    for layer in decoder.layers:
        attention = layer.attn
        if has_attention(layer):
            repeats = attention.num_heads // attention.num_kv_heads
            set_attention(layer, function if axis is None else _without_repeats(function, repeats))
        elif axis is not None:
            raise InputError(
                "model",
                type(attention).__name__,
                "cannot gather keys, which context_parallel_size above 1 asks for",
                "set that to 1, or build a model with torchtune's MultiHeadAttention",
            )


def _without_repeats(function: Attend, repeats: int) -> Attend:
    """Return an attention that undoes what torchtune does: heads of keys repeated for queries."""

    def attend_grouped(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return function(q, k[:, ::repeats], v[:, ::repeats], **options)

    return attend_grouped


def over_ranks(function: Attend, axis: ContextAxis) -> Attend:
    """Return an attention over the keys and values of all ranks of an axis."""
    group, size = axis.group, axis.size

    def attend_to_all(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        # One of each key head travels, and is kept for the backward once.
        mine = torch.stack((k, v))  # [2, R, key heads, S / C, head_dim]
        gathered = all_gather_with_gradient(mine, 0, group)
        by_rank = gathered.view(size, *mine.shape)
        keys, values = by_rank.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)
        return function(q, keys, values, **options)

    return attend_to_all
