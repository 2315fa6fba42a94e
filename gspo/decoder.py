"""The form that the pack asks a decoder to have, whichever library it comes from.

A decoder has ``layers``, ``tok_embeddings``, ``output`` and ``max_seq_len``, and is called with
tokens, ``mask`` and ``input_pos``. One of another library may add ``windows``, ``head_form``,
``attention_sizes``, ``use_attention``, ``init_buffers``, ``keep_layers`` and ``incremental``; what
they are for stands here and where they are used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# What every decoder has, torchtune's and others.
PARTS = ("layers", "tok_embeddings", "norm", "max_seq_len")


class HeadForm(NamedTuple):
    """The changes that a model makes to its logits before they are a distribution's."""

    divisor: float = 1.0
    softcap: float | None = None  # bound c of the logits, which become c * tanh(logit / c)


class AttentionSizes(NamedTuple):
    """The sizes of a layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def head_of(decoder: Any) -> HeadForm:
    """Return a decoder's ``head_form``, or the plain one where it has none."""
    return getattr(decoder, "head_form", HeadForm())


def attention_sizes(decoder: Any) -> AttentionSizes:
    """Return a decoder's ``attention_sizes``, or those of its first layer's torchtune attention."""
    if hasattr(decoder, "attention_sizes"):
        return decoder.attention_sizes
    attention = decoder.layers[0].attn
    return AttentionSizes(attention.num_heads, attention.num_kv_heads, attention.head_dim)


def keep_layers(decoder: Any, count: int) -> None:
    """Leave a decoder its first layers alone."""
    if hasattr(decoder, "keep_layers"):
        decoder.keep_layers(count)
    else:
        decoder.layers = decoder.layers[:count]


def unique_state(decoder: Any) -> dict[str, Tensor]:
    """Return a decoder's parameters by name, one that has two names by the first alone.

    Names are those of its ``state_dict``, which leaves wrappers of layers out.
    """
    unique = {}
    seen = set()
    for name, value in decoder.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            unique[name] = value
    return unique


def init_buffers(decoder: Any, device: torch.device) -> None:
    """Compute the tables that are not part of a state dict, such as those of rotary embeddings.

    Args:
        decoder: on its device, as it is after ``to_empty``.
        device: the decoder's.
    """
    if hasattr(decoder, "init_buffers"):
        decoder.init_buffers()
        return
    with device:
        for module in decoder.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
