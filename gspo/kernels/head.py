"""The loss head over chunks of rows: from hidden states to log-probabilities and gradients.

``T x V`` is never held: one buffer of a chunk of logits is used again and again. In units of one
product of all rows with the weight, f being the share of rows whose gradient is exactly zero:

- :func:`linear_loss`, for whole documents: 3 - 2f. Rows with a coefficient of zero are left out of
  both gradient products. A document longer than a chunk pays a fourth product, for its rows with a
  coefficient that do not lie in its last span of ``chunk_size`` rows.
- :func:`linear_logps`, an autograd op that knows no objective: 4 - 3f, since the backward computes
  the logits of the rows that have a gradient once more.
- :func:`logits_logps`, for logits that are there already: two reads and one write in place, no
  product.

The gradient of any objective by a row's logits is ``c * (onehot - softmax) / temperature`` with one
number c per row, and a second for an entropy bonus. So nothing here depends on which objective it
is.

One arrow points up: :func:`linear_loss` calls the objective, as its ``loss_function``, though the
objective is built on log-probabilities and the head lies below it. A document's coefficients are
known only after its log-probabilities. By calling back, the head gets them while the chunk's logits
are still in the buffer and turns these into their gradient in place. An op that returns
log-probabilities first, as :func:`linear_logps` does, has given the logits up by then and pays a
product to compute them again. Of what the loss function returns, the head reads the loss sum alone;
the second result goes to the caller as it is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo.kernels.rows import RowKernels

# Entries between rows of logits: a power of two from row to row, as 32,768 is, costs a CPU's
# product 3 %.
_ROW_GAP = 32
_MIN_ROWS_MOVED = 16  # rows copied at a time beside the buffer, or a sixteenth of all if more

Result = TypeVar("Result")
# (logps, entropy, first, last) of documents first to last - 1 -> (undivided loss sum, anything)
LossFunction = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Result]]


class _Chunk(NamedTuple):
    """Documents ``first`` to ``last - 1``, which are rows ``start`` to ``stop - 1``."""

    first: int
    last: int
    start: int
    stop: int


class _NeedsGradient(NamedTuple):
    hidden: bool
    weight: bool


class _Coefficients(NamedTuple):
    """The numbers that make the gradient of N rows of logits, each ``[N]``."""

    log_z: Tensor  # of softmax(logits / temperature)
    entropy: Tensor
    d_logps: Tensor  # gradient of the loss by the log-probabilities
    d_entropy: Tensor | None  # and by the entropies, None where there is none

    def at(self, rows: slice | Tensor) -> _Coefficients:
        """Return the coefficients of some rows."""
        log_z = self.log_z[rows]
        entropy = self.entropy[rows]
        d_logps = self.d_logps[rows]
        d_entropy = self.d_entropy
        if d_entropy is not None:
            d_entropy = d_entropy[rows]
        return _Coefficients(log_z, entropy, d_logps, d_entropy)

    def is_active(self) -> Tensor:  # [N] bool
        """Return which rows have a gradient."""
        is_active = self.d_logps != 0
        if self.d_entropy is not None:
            is_active |= self.d_entropy != 0
        return is_active


def linear_loss(
    hidden: Tensor,  # [N, H], rows with a label only
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [N] int64
    temperature: Tensor,  # [N] > 0
    label_counts: list[int],  # [D] rows of each document; documents stand one after another
    loss_function: LossFunction[Result],
    *,
    kernels: RowKernels,
    chunk_size: int,
    entropy_grad: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, list[Result]]:  # []
    """Return the loss sum of whole documents, and the loss function's other result of each chunk.

    Its gradients are done by then; the backward only scales them. See
    :func:`gspo.kernels.linear_loss`. A weight that needs no gradient costs no product for it.
    """
    needs = _needs_gradient(hidden, weight)
    chunks = _even_chunks(label_counts, chunk_size)
    head = _Head(
        hidden.detach(),
        weight.detach(),
        labels,
        temperature,
        kernels=kernels,
        buffer_rows=min(chunk_size, _longest(chunks)),
        needs=needs,
        softcap=softcap,
    )
    total = hidden.new_zeros((), dtype=torch.float32)
    results = []
    for chunk in chunks:
        spans = _spans(chunk.start, chunk.stop, chunk_size)
        loss_sum, result = _run_chunk(head, chunk, spans, loss_function, entropy_grad)
        total += loss_sum
        results.append(result)
    if not chunks:
        result = _result_without_rows(loss_function, total, len(label_counts))
        results.append(result)
    if not any(needs):
        return total, results
    d_hidden, d_weight = head.gradients()
    loss = _AttachGradients.apply(hidden, weight, total, d_hidden, d_weight)
    return loss, results


def _run_chunk(
    head: _Head,
    chunk: _Chunk,
    spans: list[slice],  # of the chunk's rows
    loss_function: LossFunction[Result],
    entropy_grad: bool,
) -> tuple[Tensor, Result]:  # []
    """Call the loss function on a chunk, and add the chunk's gradients to the head's."""
    needs_gradient = any(head.needs)
    with torch.no_grad():
        logps, log_z, entropy = head.statistics(spans)
    with torch.set_grad_enabled(needs_gradient):
        logps.requires_grad_(needs_gradient)
        entropy.requires_grad_(needs_gradient and entropy_grad)
        loss_sum, result = loss_function(logps, entropy, chunk.first, chunk.last)
    # It has no graph where none is asked for, or if the objective is constant on these documents.
    if loss_sum.requires_grad:
        d_logps, d_entropy = _differentiate(loss_sum, logps, entropy)
        coefficients = _Coefficients(log_z, entropy, d_logps, d_entropy)
        head.add_gradients(spans, coefficients)
    return loss_sum.detach(), result


def _needs_gradient(hidden: Tensor, weight: Tensor) -> _NeedsGradient:
    if not torch.is_grad_enabled():
        return _NeedsGradient(False, False)
    return _NeedsGradient(hidden.requires_grad, weight.requires_grad)


def _differentiate(
    loss_sum: Tensor,  # []
    logps: Tensor,  # [N]
    entropy: Tensor,  # [N]
) -> tuple[Tensor, Tensor | None]:  # [N], [N]
    """Return the gradients by log-probabilities and, where they require it, by entropies."""
    if entropy.requires_grad:
        inputs = (logps, entropy)
        d_logps, d_entropy = torch.autograd.grad(loss_sum, inputs, allow_unused=True)
    else:
        (d_logps,) = torch.autograd.grad(loss_sum, (logps,), allow_unused=True)
        d_entropy = None
    if d_logps is None:
        d_logps = torch.zeros_like(logps)
    return d_logps, d_entropy


def _result_without_rows(
    loss_function: LossFunction[Result], like: Tensor, num_documents: int
) -> Result:
    """Return the second result for no rows, so that a rank without any has one as others do."""
    empty = like.new_zeros(0)
    _, result = loss_function(empty, empty, 0, num_documents)
    return result


def _even_chunks(label_counts: list[int], chunk_size: int) -> list[_Chunk]:
    """Return as few chunks as can be, the longest of them as short as it can then be.

    Products of few rows are slow.
    """
    largest = _fill_chunks(label_counts, chunk_size)
    fewest = len(largest)

    def is_large_enough(size: int) -> bool:
        chunks = _fill_chunks(label_counts, size)
        return len(chunks) == fewest

    smallest = bisect_left(range(chunk_size), True, key=is_large_enough)
    return _fill_chunks(label_counts, smallest)


def _fill_chunks(label_counts: list[int], chunk_size: int) -> list[_Chunk]:
    """Return chunks with as many documents as fit, and at least one that has rows."""
    chunks = []
    first = start = stop = 0
    for document, count in enumerate(label_counts):
        num_rows = stop - start
        is_too_long = num_rows + count > chunk_size
        if count and num_rows and is_too_long:
            chunk = _Chunk(first, document, start, stop)
            chunks.append(chunk)
            first = document
            start = stop
        stop += count
    if stop > start:
        num_documents = len(label_counts)
        chunk = _Chunk(first, num_documents, start, stop)
        chunks.append(chunk)
    return chunks


def _longest(chunks: list[_Chunk]) -> int:
    """Return the rows of the longest chunk; 0 if there is none."""
    longest = 0
    for chunk in chunks:
        num_rows = chunk.stop - chunk.start
        longest = max(longest, num_rows)
    return longest


def _spans(start: int, stop: int, size: int) -> list[slice]:
    """Return rows ``start`` to ``stop - 1``, at most ``size`` at a time."""
    spans = []
    for begin in range(start, stop, size):
        end = min(begin + size, stop)
        span = slice(begin, end)
        spans.append(span)
    return spans


class _Head:
    """The rows of one call, one buffer for a chunk of logits, and the gradients so far.

    Args:
        hidden: [N, H], without a graph, as is the weight.
        weight: [V, H].
        labels: [N].
        temperature: [N].
        kernels: The backend.
        buffer_rows: The most rows whose logits are held at a time.
        needs: Which gradients are summed.
        softcap: Bound of the logits; with one, as many numbers again are held as logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: Tensor,
        *,
        kernels: RowKernels,
        buffer_rows: int,
        needs: _NeedsGradient,
        softcap: float | None = None,
    ) -> None:
        self.needs = needs
        self._softcap = softcap
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # In float32 whatever the operands are: summed over chunks, and rounded once, after the
        # loss's own factor.
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        if needs.hidden:
            self.d_hidden = torch.zeros_like(hidden, dtype=dtype)
        if needs.weight:
            self.d_weight = weight.new_empty(weight.shape, dtype=dtype)
        self._has_products = False  # before the first, what is in d_weight is not read
        if hidden.device.type == "cpu":  # where no product of bf16 has a float32 output
            hidden = hidden.to(dtype)
            weight = weight.to(dtype)
        self._hidden = hidden
        self._weight = weight
        self._labels = labels
        self._temperature = temperature
        self._kernels = kernels
        self._buffer = _new_buffer(hidden, weight, buffer_rows)

    def fill(self, rows: slice) -> Tensor:  # [N, V]
        """Put the logits of ``rows`` into the buffer."""
        num_rows = rows.stop - rows.start
        logits = self._buffer[:num_rows]
        self._put_logits(self._hidden[rows], logits)
        return logits

    def _put_logits(self, hidden: Tensor, out: Tensor) -> None:
        self._kernels.product(hidden, self._weight, out)
        if self._softcap is not None:
            out.div_(self._softcap).tanh_().mul_(self._softcap)

    def statistics(self, spans: list[slice]) -> tuple[Tensor, Tensor, Tensor]:  # each [N]
        """Return logps, log_z and entropy; the last span's logits stay in the buffer."""
        logps = []
        log_z = []
        entropy = []
        for rows in spans:
            logits = self.fill(rows)
            labels = self._labels[rows]
            temperature = self._temperature[rows]
            statistics = self._kernels.statistics(logits, labels, temperature)
            span_logps, span_log_z, span_entropy = statistics
            logps.append(span_logps)
            log_z.append(span_log_z)
            entropy.append(span_entropy)
        return torch.cat(logps), torch.cat(log_z), torch.cat(entropy)

    @torch.no_grad()
    def add_gradients(self, spans: list[slice], coefficients: _Coefficients) -> None:
        """Add the gradients of successive spans, the last of which is in the buffer."""
        origin = spans[0].start
        is_in_buffer = True
        for rows in reversed(spans):
            start = rows.start - origin
            stop = rows.stop - origin
            span = slice(start, stop)
            span_coefficients = coefficients.at(span)
            self.add_gradient(rows.start, span_coefficients, is_in_buffer=is_in_buffer)
            is_in_buffer = False

    def add_gradient(
        self, start: int, coefficients: _Coefficients, *, is_in_buffer: bool = True
    ) -> None:
        """Add the gradients of the rows from ``start``, and use the buffer up.

        Args:
            start: The first row.
            coefficients: As many as there are rows.
            is_in_buffer: The logits of these rows are in the buffer, and not to be computed again.
        """
        is_active = coefficients.is_active()
        if is_in_buffer:
            active = _move_to_front(self._buffer, is_active)
        else:
            active = _indices(is_active)
        # Known on the host: the products take no longer than their rows.
        num_active = active.numel()
        if not num_active:
            return
        rows = start + active
        logits = self._buffer[:num_active]
        if not is_in_buffer:
            self._put_logits(self._hidden[rows], logits)
        gradient = self._logits_gradient(logits, rows, coefficients.at(active))
        self._add_products(gradient, rows)

    def _logits_gradient(
        self,
        logits: Tensor,  # [N, V], overwritten
        rows: Tensor,  # [N]
        coefficients: _Coefficients,
    ) -> Tensor:  # [N, V]
        labels = self._labels[rows]
        temperature = self._temperature[rows]
        dtype = self._weight.dtype
        if self._softcap is None:
            return self._kernels.gradient(logits, labels, temperature, *coefficients, dtype)
        # The derivative of c * tanh(x / c) by x is 1 - tanh(x / c) ** 2.
        tanh = logits / self._softcap
        slope = tanh.square_().neg_().add_(1.0)
        gradient = self._kernels.gradient(logits, labels, temperature, *coefficients, dtype)
        return gradient.mul_(slope)

    def _add_products(
        self,
        gradient: Tensor,  # [N, V]
        rows: Tensor,  # [N]
    ) -> None:
        """Go from the gradient by logits to those by hidden states and weight."""
        if self.d_hidden is not None:
            num_rows = rows.numel()
            hidden_size = self._weight.shape[1]
            d_rows = self.d_hidden.new_empty(num_rows, hidden_size)
            self._kernels.product(gradient, self._weight.T, d_rows)
            self.d_hidden.index_copy_(0, rows, d_rows)
        if self.d_weight is not None:
            beta = float(self._has_products)
            hidden = self._hidden[rows]
            self._kernels.accumulate(gradient, hidden, self.d_weight, beta)
            self._has_products = True

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:  # [N, H], [V, H]
        """Return (d_hidden, d_weight) after the last chunk."""
        d_weight = self.d_weight
        if d_weight is not None and not self._has_products:
            d_weight.zero_()
        return self.d_hidden, d_weight


def _new_buffer(hidden: Tensor, weight: Tensor, num_rows: int) -> Tensor:
    """Return memory for the logits of ``num_rows`` rows, or of all if they are fewer."""
    num_rows = min(num_rows, hidden.shape[0])
    vocab_size = weight.shape[0]
    width = vocab_size + _ROW_GAP
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    memory = hidden.new_empty(num_rows, width, dtype=dtype)
    return memory[:, :vocab_size]


def _move_to_front(
    logits: Tensor,  # [N, V]
    is_active: Tensor,  # [N] bool
) -> Tensor:  # [M]
    """Move the M active rows into the first M slots; return which row each slot now holds."""
    num_rows = is_active.numel()
    active = _indices(is_active)
    num_active = active.numel()
    if num_active in (0, num_rows):
        return active
    # Active rows behind slot M are as many as there are holes before it: each fills one.
    is_filled = is_active[:num_active]
    holes = _indices(~is_filled)
    num_in_place = num_active - holes.numel()
    late = active[num_in_place:]
    size = max(_MIN_ROWS_MOVED, num_active // 16)
    _move_rows(logits, late, holes, size)
    row_of_slot = torch.arange(num_active, device=active.device)
    row_of_slot[holes] = late
    return row_of_slot


def _move_rows(
    logits: Tensor,  # [N, V]
    sources: Tensor,  # [M] int64
    slots: Tensor,  # [M] int64
    size: int,
) -> None:
    """Copy some rows over others, ``size`` at a time."""
    source_parts = sources.split(size)
    slot_parts = slots.split(size)
    for part, into in zip(source_parts, slot_parts, strict=True):
        logits.index_copy_(0, into, logits.index_select(0, part))


def _indices(
    mask: Tensor,  # [N] bool
) -> Tensor:  # [M] int64
    """Return where the mask is True."""
    indices = mask.nonzero()
    return indices.squeeze(-1)


class _AttachGradients(torch.autograd.Function):
    """An autograd op that gives a loss the gradients known already."""

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
        d_hidden, d_weight = ctx.gradients
        hidden_dtype, weight_dtype = ctx.dtypes
        if d_hidden is not None:
            d_hidden = d_hidden.mul_(d_loss).to(hidden_dtype)
        if d_weight is not None:
            d_weight = d_weight.mul_(d_loss).to(weight_dtype)
        ctx.gradients = None
        return d_hidden, d_weight, None, None, None


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *,
    kernels: RowKernels,
    chunk_size: int,
    entropy_grad: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies; see :func:`gspo.kernels.linear_logps`."""
    logps, entropy = _LinearLogps.apply(
        hidden, weight, labels, temperature, kernels, chunk_size, softcap
    )
    if not entropy_grad:
        entropy = entropy.detach()
    return logps, entropy


class _LinearLogps(torch.autograd.Function):
    """An autograd op whose backward computes the logits of active rows again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: Tensor,
        kernels: RowKernels,
        chunk_size: int,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(
            hidden,
            weight,
            labels,
            temperature,
            kernels=kernels,
            buffer_rows=chunk_size,
            needs=_NeedsGradient(False, False),
            softcap=softcap,
        )
        spans = _spans(0, hidden.shape[0], chunk_size)
        if spans:
            logps, log_z, entropy = head.statistics(spans)
        else:
            logps, log_z, entropy = (
                temperature.new_empty(0, dtype=torch.float32) for _ in range(3)
            )
        ctx.save_for_backward(hidden, weight, labels, temperature, log_z, entropy)
        ctx.kernels = kernels
        ctx.chunk_size = chunk_size
        ctx.softcap = softcap
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, temperature, log_z, entropy = ctx.saved_tensors
        all_coefficients = _Coefficients(log_z, entropy, d_logps, _none_if_zero(d_entropy))
        is_active = all_coefficients.is_active()
        active = _indices(is_active)
        num_active = active.numel()
        coefficients = all_coefficients.at(active)
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        head = _Head(
            hidden[active],
            weight,
            labels[active],
            temperature[active],
            kernels=ctx.kernels,
            buffer_rows=ctx.chunk_size,
            needs=_NeedsGradient(needs_hidden, needs_weight),
            softcap=ctx.softcap,
        )
        for rows in _spans(0, num_active, ctx.chunk_size):
            head.fill(rows)
            span_coefficients = coefficients.at(rows)
            head.add_gradient(rows.start, span_coefficients)
        d_hidden, d_weight = head.gradients()
        if d_hidden is not None:
            d_hidden = _spread(d_hidden, active, hidden)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None


def _spread(
    d_rows: Tensor,  # [M, H]
    rows: Tensor,  # [M]
    hidden: Tensor,  # [N, H]
) -> Tensor:  # [N, H]
    """Put the gradients of some rows among zeros for the others."""
    d_hidden = torch.zeros_like(hidden)
    d_rows = d_rows.to(hidden.dtype)
    return d_hidden.index_copy_(0, rows, d_rows)


def _none_if_zero(d_entropy: Tensor) -> Tensor | None:
    """Return no gradient for zeros: without one, the gradient kernel does less."""
    is_nonzero = d_entropy != 0
    if is_nonzero.any():
        return d_entropy
    return None


def logits_logps(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *,
    kernels: RowKernels,
    entropy_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies; see :func:`gspo.kernels.logits_logps`."""
    logps, entropy = _LogitsLogps.apply(logits, labels, temperature, kernels)
    if not entropy_grad:
        entropy = entropy.detach()
    return logps, entropy


class _LogitsLogps(torch.autograd.Function):
    """An autograd op whose backward writes the gradient where the logits were."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: Tensor, kernels: RowKernels
    ) -> tuple[Tensor, Tensor]:
        values = logits.detach()
        logps, log_z, entropy = kernels.statistics(values, labels, temperature)
        ctx.save_for_backward(logits, labels, temperature, log_z, entropy)
        ctx.kernels = kernels
        return logps, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, temperature, log_z, entropy = ctx.saved_tensors
        entropy = entropy.detach()
        d_entropy_or_none = _none_if_zero(d_entropy)
        coefficients = _Coefficients(log_z, entropy, d_logps, d_entropy_or_none)
        values = logits.detach()
        dtype = logits.dtype
        kernels = ctx.kernels
        gradient = kernels.gradient(values, labels, temperature, *coefficients, dtype)
        return gradient, None, None, None
