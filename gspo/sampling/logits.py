"""Logits of the last hidden states, as the samplers compute them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def float32_logits(
    hidden: Tensor,  # [N, H], normalised
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
) -> Tensor:  # [N, V] float32
    """Return logits that were never rounded to bf16: that alone would err by 1e-2 nats."""
    is_16_bit = hidden.dtype != torch.float32
    if is_16_bit and hidden.is_cuda:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = F.linear(hidden.float(), weight.float())
    if bias is None:
        return logits
    return logits + bias
