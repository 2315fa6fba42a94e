"""Logits of the last hidden states, as the samplers compute them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gspo.sampling.product import Product


def float32_logits(
    hidden: Tensor,  # [N, H], normalised
    head: Product,
) -> Tensor:  # [N, V] float32
    """Return logits that were never rounded to bf16: that alone would err by 1e-2 nats."""
    if hidden.dtype is torch.float32:
        return head(hidden)
    weight = head.weight
    if hidden.is_cuda:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = F.linear(hidden.float(), weight.float())
    bias = head.bias
    if bias is None:
        return logits
    return logits + bias
