"""The loss head in plain torch: log-probabilities and entropies, exact in float32.

The truth that faster kernels are compared with. It is chunked over tokens, so that ``T x V`` is
never held whole. The backward computes the logits again, of the rows that have a gradient alone: a
row whose coefficient is 0 adds exactly nothing, even if its hidden state is not finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo.kernels.rows import at_least_float32


def linear_logps(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    *,
    chunk_size: int = 4096,
    entropy_grad: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # [T], [T] float32
    """Return each label's log-probability, and the entropies, in nats.

    The distribution is ``softmax(hidden @ weight.T / temperature)``. ``entropy_grad`` lets
    gradients flow through the entropy. ``softcap`` is a bound of the logits before the division.
    """
    chunks = zip(
        hidden.split(chunk_size),
        labels.split(chunk_size),
        temperature.split(chunk_size),
        strict=True,
    )
    logps = []
    entropy = []
    for chunk_hidden, chunk_labels, chunk_temperature in chunks:
        chunk_logps, chunk_entropy = _RowsWithGradient.apply(
            chunk_hidden, weight, chunk_labels, chunk_temperature, softcap
        )
        logps.append(chunk_logps)
        entropy.append(chunk_entropy)
    all_entropy = torch.cat(entropy)
    if not entropy_grad:
        all_entropy = all_entropy.detach()
    return torch.cat(logps), all_entropy


def logits_logps(
    logits: Tensor,  # [T, V]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    *,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:  # [T], [T] float32
    """Return what :func:`linear_logps` does, from logits that are there already."""
    logps, entropy = _RowsWithGradient.apply(logits, None, labels, temperature, None)
    if not entropy_grad:
        entropy = entropy.detach()
    return logps, entropy


class _RowsWithGradient(torch.autograd.Function):
    """Autograd's own gradient of :func:`_statistics`, without the rows that have none.

    Autograd alone multiplies their values by 0, and 0 * nan is nan.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        labels: Tensor,
        temperature: Tensor,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, weight, labels, temperature)
        ctx.softcap = softcap
        return _statistics(rows, weight, labels, temperature, softcap)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, labels, temperature = ctx.saved_tensors
        has_gradient = (d_logps != 0) | (d_entropy != 0)
        active = has_gradient.nonzero().squeeze(-1)
        needs_rows, needs_weight, *_ = ctx.needs_input_grad
        active_rows = rows[active].requires_grad_(needs_rows)
        labels = labels[active]
        temperature = temperature[active]
        if weight is not None:
            weight = weight.detach().requires_grad_(needs_weight)
        with torch.enable_grad():
            outputs = _statistics(active_rows, weight, labels, temperature, ctx.softcap)
            torch.autograd.backward(outputs, (d_logps[active], d_entropy[active]))
        d_rows = None
        if needs_rows:
            d_rows = torch.zeros_like(rows).index_copy_(0, active, active_rows.grad)
        d_weight = None if weight is None else weight.grad
        return d_rows, d_weight, None, None, None


def _statistics(
    rows: Tensor,  # [N, H], or [N, V] logits
    weight: Tensor | None,  # [V, H]; None if the rows are logits
    labels: Tensor,  # [N]
    temperature: Tensor,  # [N]
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # [N], [N]
    # Statistics from fp32 logits: bf16-rounded ones err by 1e-4 to 1e-3, as wide as GSPO's clip
    # range.
    logits = at_least_float32(rows)
    if weight is not None:
        with torch.autocast(rows.device.type, enabled=False):
            logits = logits @ at_least_float32(weight).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    all_logps = (logits / temperature[:, None]).log_softmax(-1)
    logps = all_logps.gather(-1, labels[:, None]).squeeze(-1)
    entropy = -(all_logps.exp() * all_logps).sum(-1)
    return logps, entropy
