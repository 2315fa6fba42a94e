"""The loss head's operations on rows of logits, in plain torch.

Through ``torch.compile`` it is the backend of a CPU. Four operations make a backend, see
:class:`RowKernels`. :mod:`gspo.kernels.head` knows nothing else of a device, and nothing here knows
what an objective is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowKernels:
    """The operations of one backend, for N rows of float32 logits ``[N, V]``.

    Vectors are [N] float32, in nats.

    - ``product(hidden [N, H], weight [V, H], out [N, V])`` writes ``hidden @ weight.T`` from
      float32 accumulators.
    - ``statistics(logits, labels, temperature) -> logps, log_z, entropy`` of
      ``softmax(logits / temperature)``.
    - ``gradient(logits, labels, temperature, log_z, entropy, d_logps, d_entropy, dtype) -> [N, V]``
      is the gradient of ``(d_logps * logps + d_entropy * entropy).sum()`` by the logits, in
      ``dtype``, and takes their memory. ``d_entropy`` may be None.
    - ``accumulate(gradient [N, V], hidden [N, H], total [V, H], beta)`` makes a float32 ``total``
      into ``beta * total + gradient.T @ hidden``; with 0 it is not read.
    """

    name: str
    product: Callable[[Tensor, Tensor, Tensor], None]
    statistics: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[..., Tensor]
    accumulate: Callable[[Tensor, Tensor, Tensor, float], None]


def product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write ``hidden @ weight.T``, see :class:`RowKernels`."""
    columns = weight.T
    dtype = out.dtype
    if hidden.dtype == dtype:
        torch.mm(hidden, columns, out=out)
    else:
        torch.mm(hidden, columns, out_dtype=dtype, out=out)


def statistics(
    logits: Tensor, labels: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logps, log_z and entropy, see :class:`RowKernels`."""
    logits = at_least_float32(logits)
    inverse = temperature.reciprocal()
    largest = logits.amax(-1)
    inverse_column = inverse[:, None]
    largest_column = largest[:, None]
    shifted = (logits - largest_column) * inverse_column
    # A floor of 1e-38 changes no sum of 1 or more; 0 * -inf would be nan, and subnormal numbers
    # are slow.
    shifted = shifted.clamp(min=-87.0)
    exponentials = shifted.exp()
    total = exponentials.sum(-1)
    weighted = exponentials * shifted
    weighted_total = weighted.sum(-1)
    log_total = total.log()
    label_column = labels[:, None]
    label_logits = logits.gather(-1, label_column)
    label_logits = label_logits.squeeze(-1)
    below_largest = label_logits - largest
    logps = below_largest * inverse - log_total
    largest_scaled = largest * inverse
    log_z = largest_scaled + log_total
    mean_shifted = weighted_total / total
    entropy = log_total - mean_shifted
    return logps, log_z, entropy


def gradient(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    log_z: Tensor,
    entropy: Tensor,
    d_logps: Tensor,
    d_entropy: Tensor | None,
    dtype: torch.dtype,
    *,
    overwrite: Callable[..., None],
) -> Tensor:
    """Return the gradient by the logits, see :class:`RowKernels`.

    ``overwrite`` is :func:`_overwrite`, compiled or not.
    """
    inverse = temperature.reciprocal()
    scale = d_logps * inverse
    vectors: tuple[Tensor, ...] = (inverse, log_z, scale)
    if d_entropy is not None:
        entropy_scale = d_entropy * inverse
        vectors += (entropy, entropy_scale)
    # The label's entry by itself and before anything is rounded: near a probability of 1 it is a
    # small difference.
    label_column = labels[:, None]
    label_logits = logits.gather(-1, label_column)
    common_entries = _entries(label_logits, *vectors)
    scale_column = scale[:, None]
    label_entries = common_entries + scale_column
    logits_dtype = logits.dtype
    label_entries = label_entries.to(logits_dtype)
    overwrite(logits, *vectors)
    logits.scatter_(-1, label_column, label_entries)
    return logits.to(dtype)


def _overwrite(logits: Tensor, *vectors: Tensor) -> None:
    entries = _entries(logits, *vectors)
    logits.copy_(entries)


def _entries(
    logits: Tensor,  # [N, V], or [N, 1] of the labels
    inverse: Tensor,  # [N] as are the next, 1 / temperature
    log_z: Tensor,
    scale: Tensor,  # d_logps / temperature
    entropy: Tensor | None = None,
    entropy_scale: Tensor | None = None,  # d_entropy / temperature
) -> Tensor:
    """Return the part of the gradient that all entries of a row have: the label's has one more."""
    # What is below 1e-26 adds nothing; times its coefficient it could be subnormal, and products
    # slow down at these.
    inverse = inverse[:, None]
    log_z = log_z[:, None]
    scale = scale[:, None]
    all_logps = at_least_float32(logits) * inverse - log_z
    all_logps = all_logps.clamp(min=-60.0)
    p = all_logps.exp()
    is_zero = scale == 0
    negative_scale = -scale
    entries = torch.where(is_zero, 0.0, negative_scale * p)  # not a product: nan * 0 is nan
    if entropy is None or entropy_scale is None:
        return entries
    entropy = entropy[:, None]
    entropy_scale = entropy_scale[:, None]
    surprise = all_logps + entropy
    is_zero = entropy_scale == 0
    entropy_entries = torch.where(is_zero, 0.0, entropy_scale * p * surprise)
    return entries - entropy_entries


def at_least_float32(x: Tensor) -> Tensor:
    """Return 16-bit values as float32, and others as they are."""
    is_wide = x.dtype in (torch.float32, torch.float64)
    if is_wide:
        return x
    return x.float()


def accumulate(gradient: Tensor, hidden: Tensor, total: Tensor, beta: float) -> None:
    """Add ``gradient.T @ hidden`` to ``beta * total``, see :class:`RowKernels`."""
    columns = gradient.T
    dtype = total.dtype
    if gradient.dtype == dtype:
        torch.addmm(total, columns, hidden, beta=beta, out=total)
    else:
        torch.addmm(total, columns, hidden, beta=beta, out_dtype=dtype, out=total)


@cache
def compiled() -> RowKernels:
    """Return the operations through Inductor, which makes each of them one pass over a row."""
    compiled_statistics = torch.compile(statistics, dynamic=True)
    compiled_overwrite = torch.compile(_overwrite, dynamic=True)
    return RowKernels(
        name="compile",
        product=product,
        statistics=compiled_statistics,
        gradient=partial(gradient, overwrite=compiled_overwrite),
        accumulate=accumulate,
    )


PLAIN = RowKernels(
    "plain", product, statistics, partial(gradient, overwrite=_overwrite), accumulate
)
