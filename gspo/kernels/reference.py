"""The loss head in plain torch: log-probabilities and entropies, exact in float32.

The truth that faster kernels are compared with. It is chunked over tokens, so that ``T x V`` is
never held whole: with more than one chunk the logits are computed again in the backward. Unlike
theirs, its gradients are not finite if any row of hidden states is not, even one that the objective
does not use.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gspo.kernels.rows import at_least_float32


def linear_logps(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    *,
    chunk_size: int = 4096,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # [T], [T] float32
    """Return each label's log-probability, and the entropies, in nats.

    The distribution is ``softmax(hidden @ weight.T / temperature)``. ``entropy_grad`` lets
    gradients flow through the entropy.
    """
    if hidden.shape[0] <= chunk_size:
        return _chunk_logps(hidden, weight, labels, temperature, entropy_grad)
    chunks = zip(
        hidden.split(chunk_size),
        labels.split(chunk_size),
        temperature.split(chunk_size),
        strict=True,
    )
    logps = []
    entropy = []
    for chunk_hidden, chunk_labels, chunk_temperature in chunks:
        chunk_logps, chunk_entropy = checkpoint(
            _chunk_logps,
            chunk_hidden,
            weight,
            chunk_labels,
            chunk_temperature,
            entropy_grad,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        logps.append(chunk_logps)
        entropy.append(chunk_entropy)
    return torch.cat(logps), torch.cat(entropy)


def _chunk_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Tensor, entropy_grad: bool
) -> tuple[Tensor, Tensor]:
    # Statistics from fp32 logits: bf16-rounded ones err by 1e-4 to 1e-3, as wide as GSPO's clip
    # range.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = at_least_float32(hidden) @ at_least_float32(weight).T
    return logits_logps(logits, labels, temperature, entropy_grad=entropy_grad)


def logits_logps(
    logits: Tensor,  # [T, V]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    *,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # [T], [T] float32
    """Return what :func:`linear_logps` does, from logits that are there already."""
    temperature = temperature.detach()[:, None]
    all_logps = (at_least_float32(logits) / temperature).log_softmax(-1)
    logps = all_logps.gather(-1, labels[:, None]).squeeze(-1)
    if not entropy_grad:
        all_logps = all_logps.detach()
    entropy = -(all_logps.exp() * all_logps).sum(-1)
    return logps, entropy
