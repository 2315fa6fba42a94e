"""The loss head in plain torch: log-probabilities and entropies from hidden states, exact in float32.

The truth that faster kernels are compared with. It is chunked over tokens, so that ``T x V`` is never held whole: with
more than one chunk the logits are computed again in the backward. Unlike theirs, its gradients are not finite if any
row of hidden states is not, even one that the objective does not use.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def linear_logps(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    *,
    chunk_size: int = 4096,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # [T], [T] float32
    """Log-probability of each label, and entropy, of ``softmax(hidden @ weight.T / temperature)``, in nats.

    ``entropy_grad`` lets gradients flow through the entropy.
    """
    one_chunk = partial(_chunk_logps, entropy_grad=entropy_grad)
    if hidden.shape[0] <= chunk_size:
        return one_chunk(hidden, weight, labels, temperature)
    parts = [
        checkpoint(one_chunk, h, weight, y, t, use_reentrant=False, preserve_rng_state=False)
        for h, y, t in zip(
            hidden.split(chunk_size),
            labels.split(chunk_size),
            temperature.split(chunk_size),
            strict=True,
        )
    ]
    logps, entropy = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropy)


def _chunk_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor, *, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    # Statistics from fp32 logits: bf16-rounded ones err by 1e-4 to 1e-3, as wide as GSPO's band.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _at_least_float32(hidden) @ _at_least_float32(weight).T
    return logits_logps(logits, labels, temperature, entropy_grad=entropy_grad)


def logits_logps(
    logits: Tensor,  # [T, V]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    *,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # [T], [T] float32
    """The same from logits."""
    all_logps = (_at_least_float32(logits) / temperature.detach()[:, None]).log_softmax(-1)
    logps = all_logps.gather(-1, labels[:, None]).squeeze(-1)
    all_logps = all_logps if entropy_grad else all_logps.detach()
    return logps, -(all_logps.exp() * all_logps).sum(-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
