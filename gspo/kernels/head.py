"""The loss head over chunks of rows: from hidden states and the LM-head weight to log-probabilities and gradients.

Never holds ``T x V``: one buffer of a chunk of logits is used again and again. In units of one product of all rows with
the weight, f being the share of rows whose gradient is exactly zero:

- :func:`linear_loss`, for whole documents: 3 - 2f. The objective runs on the chunk while its logits are at hand, its
  autograd gives one coefficient per row, and rows with a coefficient of zero are left out of both gradient products.
  A document longer than a chunk pays a fourth product for its other rows, but for those in its last span.
- :func:`linear_logps`, an autograd op that knows no objective: 4 - 3f, since the backward computes the logits of the
  rows that have a gradient once more.
- :func:`logits_logps`, for logits that are there already: two reads and one write in place, no product.

The gradient of any objective with respect to a row's logits is ``c * (onehot - softmax) / temperature`` with one number
c per row, and a second for an entropy bonus, so nothing here depends on which objective it is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo.kernels.rows import RowKernels
from gspo.types import MetricSums

_APART = 32  # entries between rows of logits: a power of two from row to row, as 32,768 is, costs a CPU's product 3 %
_MOVED_AT_A_TIME = 16  # rows copied beside the buffer

Seam = Callable[[Tensor, Tensor, int, int], tuple[Tensor, MetricSums]]


def linear_loss(
    hidden: Tensor,  # [N, H], rows with a label only
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] > 0
    label_counts: list[int],  # [D] rows of each document, which stand one after another
    seam: Seam,
    *,
    kernels: RowKernels,
    chunk_size: int,
    entropy_grad: bool = False,
) -> tuple[Tensor, list[MetricSums]]:
    """The loss of whole documents and, when it returns, its gradients; the backward only scales them.

    Args:
        hidden: hidden states.
        weight: of the LM head; one that needs no gradient costs no product for it.
        labels: next tokens.
        temperature: of each row.
        label_counts: on the host.
        seam: ``(logps, entropy, first, last)`` of documents ``first`` to ``last - 1`` to their undivided loss sum and
            metric sums; plain torch, differentiated here with respect to its first two arguments.
        kernels: the backend.
        chunk_size: rows whose logits are held at a time. A longer document costs one more product of its rows that
            have a coefficient.
        entropy_grad: the loss depends on the entropy.

    Returns:
        The loss sum, and the metric sums of each chunk.
    """
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    chunks = _chunks(label_counts, chunk_size)
    longest = min(chunk_size, max((stop - start for _, _, start, stop in chunks), default=0))
    head = _Head(hidden.detach(), weight.detach(), labels, temperature, kernels, longest, needs)
    loss = hidden.new_zeros((), dtype=torch.float32)
    metrics = []
    for first, last, start, stop in chunks:
        spans = [(i, min(i + chunk_size, stop)) for i in range(start, stop, chunk_size)]
        with torch.no_grad():
            parts = [head.statistics(*span) for span in spans]
            logps, log_z, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
        with torch.set_grad_enabled(any(needs)):
            logps.requires_grad_(any(needs))
            entropy.requires_grad_(any(needs) and entropy_grad)
            part, found = seam(logps, entropy, first, last)
        metrics.append(found)
        loss += part.detach()
        if (
            not part.requires_grad
        ):  # none is asked for, or the objective has none for these documents
            continue
        d_logps, d_entropy = _coefficients(part, logps, entropy)
        with torch.no_grad():
            for i, (a, b) in reversed(list(enumerate(spans))):
                at = slice(a - start, b - start)
                rest = (
                    log_z[at],
                    entropy[at],
                    d_logps[at],
                    None if d_entropy is None else d_entropy[at],
                )
                head.add_gradient(a, *rest, filled=i == len(spans) - 1)
    if not metrics:  # no rows, but the names of the metrics must be those of the other ranks
        none = loss.new_zeros(0)
        metrics.append(seam(none, none, 0, len(label_counts))[1])
    if not any(needs):
        return loss, metrics
    return _Attach.apply(hidden, weight, loss, *head.gradients()), metrics


def _chunks(label_counts: list[int], chunk_size: int) -> list[tuple[int, int, int, int]]:
    """As few chunks as can be, and the longest of them as short as it can then be: products of few rows are slow."""
    fewest = len(_filled(label_counts, chunk_size))
    smallest = bisect_left(
        range(chunk_size), True, key=lambda size: len(_filled(label_counts, size)) == fewest
    )
    return _filled(label_counts, smallest)


def _filled(label_counts: list[int], chunk_size: int) -> list[tuple[int, int, int, int]]:
    """Documents first to last - 1 in rows start to stop - 1: as many as fit, at least one with rows."""
    found = []
    first = start = stop = 0
    for i, count in enumerate(label_counts):
        if count and stop > start and stop + count - start > chunk_size:
            found.append((first, i, start, stop))
            first, start = i, stop
        stop += count
    if stop > start:
        found.append((first, len(label_counts), start, stop))
    return found


def _coefficients(loss: Tensor, logps: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of a loss sum with respect to log-probabilities and, where it may depend on them, entropies."""
    outputs = (logps, entropy) if entropy.requires_grad else (logps,)
    found = torch.autograd.grad(loss, outputs, allow_unused=True)
    d_logps = torch.zeros_like(logps) if found[0] is None else found[0]
    return d_logps, found[1] if len(found) > 1 else None


class _Head:
    """The rows of one call, one buffer for a chunk of logits, and the gradients so far."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: Tensor,
        kernels: RowKernels,
        chunk_size: int,
        needs: list[bool],
    ) -> None:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # In float32 whatever the operands are: sums over chunks, and rounded once, after the loss's own factor.
        self.d_hidden = torch.zeros_like(hidden, dtype=dtype) if needs[0] else None
        self.d_weight = weight.new_empty(weight.shape, dtype=dtype) if needs[1] else None
        self.beta = 0.0  # what is in d_weight before the first product is not read
        if hidden.device.type == "cpu":  # where no product of bf16 has a float32 output
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        self.hidden, self.weight, self.labels, self.temperature = (
            hidden,
            weight,
            labels,
            temperature,
        )
        self.kernels = kernels
        num_rows, vocab_size = min(chunk_size, hidden.shape[0]), weight.shape[0]
        self.buffer = hidden.new_empty(num_rows, vocab_size + _APART, dtype=dtype)[:, :vocab_size]

    def fill(self, start: int, stop: int) -> Tensor:
        logits = self.buffer[: stop - start]
        self.kernels.product(self.hidden[start:stop], self.weight, logits)
        return logits

    def statistics(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.fill(start, stop)
        return self.kernels.statistics(
            logits, self.labels[start:stop], self.temperature[start:stop]
        )

    def add_gradient(
        self,
        start: int,
        log_z: Tensor,
        entropy: Tensor,
        d_logps: Tensor,
        d_entropy: Tensor | None,
        *,
        filled: bool = True,
    ) -> None:
        """Adds the gradients of the rows from ``start``, whose logits, if ``filled``, are in the buffer; uses it up."""
        active = d_logps != 0
        if d_entropy is not None:
            active |= d_entropy != 0
        rows = _to_front(self.buffer, active) if filled else active.nonzero().squeeze(-1)
        num_rows = rows.numel()  # known on the host: the products take no longer than their rows
        if not num_rows:
            return
        at = start + rows
        if not filled:
            self.kernels.product(self.hidden[at], self.weight, self.buffer[:num_rows])
        gradient = self.kernels.gradient(
            self.buffer[:num_rows],
            self.labels[at],
            self.temperature[at],
            log_z[rows],
            entropy[rows],
            d_logps[rows],
            None if d_entropy is None else d_entropy[rows],
            self.weight.dtype,
        )
        if self.d_hidden is not None:
            found = self.d_hidden.new_empty(num_rows, self.weight.shape[1])
            self.kernels.product(gradient, self.weight.T, found)
            self.d_hidden.index_copy_(0, at, found)
        if self.d_weight is not None:
            self.kernels.accumulate(gradient, self.hidden[at], self.d_weight, self.beta)
            self.beta = 1.0

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden states and weight, once all chunks are in."""
        if self.d_weight is not None and not self.beta:
            self.d_weight.zero_()
        return self.d_hidden, self.d_weight


def _to_front(logits: Tensor, active: Tensor) -> Tensor:
    """Moves the active rows, M in number, into the first M places; returns which row each of these now holds."""
    rows = active.nonzero().squeeze(-1)
    num_rows = rows.numel()
    if num_rows == active.numel() or not num_rows:
        return rows
    holes = (~active[:num_rows]).nonzero().squeeze(-1)
    late = rows[
        num_rows - holes.numel() :
    ]  # as many active rows lie behind the first M as there are holes in these
    part = max(_MOVED_AT_A_TIME, num_rows // 16)
    for to, source in zip(holes.split(part), late.split(part), strict=True):
        logits.index_copy_(0, to, logits.index_select(0, source))
    order = torch.arange(num_rows, device=rows.device)
    order[holes] = late
    return order


class _Attach(torch.autograd.Function):
    """Gives a loss the gradients that are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        loss: Tensor,
        d_hidden: Tensor | None,
        d_weight: Tensor | None,
    ) -> Tensor:
        ctx.gradients = (d_hidden, d_weight)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss head's gradients are used up: call backward once")
        found = [
            None if x is None else x.mul_(d_loss).to(dtype)
            for x, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return *found, None, None, None


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *,
    kernels: RowKernels,
    chunk_size: int,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies as an autograd op; see :func:`gspo.kernels.linear_logps`."""
    logps, entropy = _LinearLogps.apply(hidden, weight, labels, temperature, kernels, chunk_size)
    return logps, entropy if entropy_grad else entropy.detach()


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: Tensor,
        kernels: RowKernels,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden, weight, labels, temperature, kernels, chunk_size, [False, False])
        num_rows = hidden.shape[0]
        spans = [(i, min(i + chunk_size, num_rows)) for i in range(0, num_rows, chunk_size)]
        parts = [head.statistics(*span) for span in spans] or [(temperature.float(),) * 3]
        logps, log_z, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, labels, temperature, log_z, entropy)
        ctx.kernels, ctx.chunk_size = kernels, chunk_size
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, temperature, log_z, entropy = ctx.saved_tensors
        active = (
            ((d_logps != 0) | (d_entropy != 0)).nonzero().squeeze(-1)
        )  # the others are not computed again
        rows = (
            x[active] for x in (hidden, labels, temperature, log_z, entropy, d_logps, d_entropy)
        )
        hidden_rows, labels, temperature, log_z, entropy, d_logps, d_entropy = rows
        with_entropy = bool((d_entropy != 0).any())
        head = _Head(
            hidden_rows,
            weight,
            labels,
            temperature,
            ctx.kernels,
            ctx.chunk_size,
            ctx.needs_input_grad[:2],
        )
        for a in range(0, active.numel(), ctx.chunk_size):
            b = min(a + ctx.chunk_size, active.numel())
            head.fill(a, b)
            head.add_gradient(
                a, log_z[a:b], entropy[a:b], d_logps[a:b], d_entropy[a:b] if with_entropy else None
            )
        d_hidden, d_weight = head.gradients()
        if d_hidden is not None:
            d_hidden = torch.zeros_like(hidden).index_copy_(0, active, d_hidden.to(hidden.dtype))
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None


def logits_logps(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *,
    kernels: RowKernels,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of logits that are there; see :func:`gspo.kernels.logits_logps`."""
    logps, entropy = _LogitsLogps.apply(logits, labels, temperature, kernels)
    return logps, entropy if entropy_grad else entropy.detach()


class _LogitsLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: Tensor, kernels: RowKernels
    ) -> tuple[Tensor, Tensor]:
        logps, log_z, entropy = kernels.statistics(logits.detach(), labels, temperature)
        ctx.save_for_backward(logits, labels, temperature, log_z, entropy)
        ctx.kernels = kernels
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, temperature, log_z, entropy = ctx.saved_tensors
        with_entropy = d_entropy if bool((d_entropy != 0).any()) else None
        rest = (labels, temperature, log_z, entropy.detach(), d_logps, with_entropy)
        return ctx.kernels.gradient(logits.detach(), *rest, logits.dtype), None, None, None
