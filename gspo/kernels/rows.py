"""What the loss head does to rows of logits, in plain torch; through ``torch.compile`` it is the kernel of a CPU.

Three operations make a backend, see :class:`RowKernels`. The drivers in :mod:`gspo.kernels.head` know nothing else of
a device, and nothing here knows what an objective is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowKernels:
    """The operations of one backend, for N rows of float32 logits ``[N, V]``; vectors are [N] float32, in nats.

    - ``product(hidden [N, H], weight [V, H], out [N, V])`` writes ``hidden @ weight.T`` from float32 accumulators.
    - ``statistics(logits, labels, temperature) -> logps, log_z, entropy`` of ``softmax(logits / temperature)``.
    - ``gradient(logits, labels, temperature, log_z, entropy, d_logps, d_entropy, dtype) -> [N, V]`` is the gradient of
      ``(d_logps * logps + d_entropy * entropy).sum()`` with respect to the logits, in ``dtype``, and takes their
      memory. ``d_entropy`` may be None.
    - ``accumulate(gradient [N, V], hidden [N, H], total [V, H], beta)`` makes a float32 ``total`` into
      ``beta * total + gradient.T @ hidden``; with 0 it is not read.
    """

    name: str
    product: Callable[[Tensor, Tensor, Tensor], None]
    statistics: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[..., Tensor]
    accumulate: Callable[[Tensor, Tensor, Tensor, float], None]


def product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """See :class:`RowKernels`."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)


def statistics(
    logits: Tensor, labels: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :class:`RowKernels`."""
    logits = _at_least_float32(logits)
    inverse = temperature.reciprocal()
    largest = logits.amax(-1)
    # A floor of 1e-38 changes no sum of 1 or more; 0 * -inf would be nan, and subnormal numbers are slow.
    shifted = ((logits - largest[:, None]) * inverse[:, None]).clamp(min=-87.0)
    exponentials = shifted.exp()
    total = exponentials.sum(-1)
    weighted = (exponentials * shifted).sum(-1)
    log_total = total.log()
    label_logits = logits.gather(-1, labels[:, None]).squeeze(-1)
    logps = (label_logits - largest) * inverse - log_total
    return logps, largest * inverse + log_total, log_total - weighted / total


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
    """See :class:`RowKernels`; ``overwrite`` is :func:`_overwrite`, compiled or not."""
    inverse = temperature.reciprocal()
    scale = d_logps * inverse
    rest = (
        (inverse, log_z, scale)
        if d_entropy is None
        else (inverse, log_z, scale, entropy, d_entropy * inverse)
    )
    # By itself and before anything is rounded: near a probability of 1 it is a small difference.
    at_label = _entries(logits.gather(-1, labels[:, None]), *rest) + scale[:, None]
    overwrite(logits, *rest)
    logits.scatter_(-1, labels[:, None], at_label.to(logits.dtype))
    return logits.to(dtype)


def _overwrite(logits: Tensor, *rest: Tensor) -> None:
    logits.copy_(_entries(logits, *rest))


def _entries(
    logits: Tensor,
    inverse: Tensor,
    log_z: Tensor,
    scale: Tensor,
    entropy: Tensor | None = None,
    entropy_scale: Tensor | None = None,
) -> Tensor:
    """The part of the gradient that all entries of a row have."""
    # What is below 1e-26 adds nothing; times its coefficient it could be subnormal, and products slow down at these.
    all_logps = (_at_least_float32(logits) * inverse[:, None] - log_z[:, None]).clamp(min=-60.0)
    p = all_logps.exp()
    found = torch.where(
        scale[:, None] == 0, 0.0, -scale[:, None] * p
    )  # not a product: nan * 0 is nan
    if entropy is not None and entropy_scale is not None:
        surprise = all_logps + entropy[:, None]
        found = found - torch.where(
            entropy_scale[:, None] == 0, 0.0, entropy_scale[:, None] * p * surprise
        )
    return found


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def accumulate(gradient: Tensor, hidden: Tensor, total: Tensor, beta: float) -> None:
    """See :class:`RowKernels`."""
    if gradient.dtype == total.dtype:
        torch.addmm(total, gradient.T, hidden, beta=beta, out=total)
    else:
        torch.addmm(total, gradient.T, hidden, beta=beta, out_dtype=total.dtype, out=total)


@cache
def compiled() -> RowKernels:
    """The operations through Inductor, which makes one pass over a row out of each loop above."""
    overwrite = torch.compile(_overwrite, dynamic=True)
    return RowKernels(
        "compile",
        product,
        torch.compile(statistics, dynamic=True),
        partial(gradient, overwrite=overwrite),
        accumulate,
    )


PLAIN = RowKernels(
    "plain", product, statistics, partial(gradient, overwrite=_overwrite), accumulate
)
