"""Decoders without adapters, which is what samplers and merged models are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gspo.adapters.linear import replace_torchtune
from gspo.adapters.nf4 import NF4Linear
from gspo.decoder import init_buffers


def build_replica(build_decoder: Callable[[], Any], device: torch.device) -> Any:
    """Build the decoder that merged weights are for, with memory and without weights.

    Args:
        build_decoder: makes a decoder, with or without adapters, on the default device.
        device: of the replica.
    """
    with torch.device("meta"):
        decoder = build_decoder()
    remove_adapters(decoder)
    decoder.to_empty(device=device)
    if hasattr(decoder, "tie_weights"):  # of transformers: to_empty makes two of one
        decoder.tie_weights()
    init_buffers(decoder, device)
    return decoder


def remove_adapters(decoder: nn.Module) -> None:
    """Leave the base model, with whole weights on the meta device for those in 4 bits. In place."""
    replace_torchtune(decoder)
    for module in list(decoder.modules()):
        for name, child in module.named_children():
            plain = _plain_layer(child)
            if plain is not child:
                setattr(module, name, plain)


def _plain_layer(module: Any) -> Any:
    base: Any = getattr(module, "base_layer", module)
    if not isinstance(base, NF4Linear):
        return base
    with torch.device("meta"):
        linear: Any = nn.Linear(base.in_features, base.out_features, bias=False, dtype=base.dtype)
    linear.bias = base.bias
    return linear
