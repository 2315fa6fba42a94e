"""The loss head's operations on rows of logits for CUDA devices.

Triton kernels do the rows, cuBLAS the products. One program takes one row, and reads it once.
Nothing is tuned at run time: a kernel that writes in place would corrupt its input by being tried
out. With ``TRITON_INTERPRET=1`` in the environment before triton is imported, all of it runs on a
CPU, with the products of :mod:`gspo.kernels.rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspo.kernels import rows
from gspo.kernels.rows import RowKernels

BLOCK = 4096  # columns that a program takes at a time
NUM_WARPS = 8  # so 16 columns a thread, which are four loads of 16 bytes in flight in float32


def statistics(
    logits: Tensor, labels: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logps, log_z and entropy, see :class:`gspo.kernels.rows.RowKernels`.

    Logits may be of 16 bits too; a label out of range gives nan.
    """
    logits = _with_dense_rows(logits)
    num_rows = logits.shape[0]
    logps = logits.new_empty(num_rows, dtype=torch.float32)
    log_z = logits.new_empty(num_rows, dtype=torch.float32)
    entropy = logits.new_empty(num_rows, dtype=torch.float32)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _statistics_kernel[(num_rows,)](
            logits,
            *_contiguous(labels, temperature),
            logps,
            log_z,
            entropy,
            logits.stride(0),
            WIDTH=16 // logits.dtype.itemsize,
            **_launch_options(logits),
        )
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
) -> Tensor:
    """Return the gradient by the logits, see :class:`gspo.kernels.rows.RowKernels`.

    A narrower ``dtype`` takes the first part of each row's memory.
    """
    fits = dtype.itemsize <= logits.dtype.itemsize
    assert fits, "the gradient does not fit in the logits' memory"
    torch.autograd.graph.increment_version(logits)  # so that autograd refuses a second backward
    logits = _with_dense_rows(logits)
    out = logits.view(dtype)[:, : logits.shape[1]]
    with torch.cuda.device_of(logits):
        _gradient_kernel[(logits.shape[0],)](
            logits,
            out,
            *_contiguous(labels, temperature, log_z, entropy, d_logps, d_entropy),
            logits.stride(0),
            out.stride(0),
            **_launch_options(logits),
        )
    return out


def _with_dense_rows(logits: Tensor) -> Tensor:
    """Return the logits, copied if rows overlap or have gaps; they may lie apart, as in a slice."""
    is_dense = logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]
    return logits if is_dense else logits.contiguous()


def _contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """Return dense vectors: what autograd hands to a backward is often one number, expanded."""
    return [None if vector is None else vector.contiguous() for vector in vectors]


def _launch_options(logits: Tensor) -> dict[str, int]:
    vocab_size = logits.shape[1]
    is_aligned = logits.stride(0) % 16 == 0
    block = (
        BLOCK if is_aligned else BLOCK // 2
    )  # loaded one by one, entries take twice the registers
    block = min(block, max(8, triton.next_power_of_2(vocab_size)))
    return {"VOCAB_SIZE": vocab_size, "BLOCK": block, "num_warps": NUM_WARPS}


# Slices that start anywhere: specialised on their alignment, a kernel would be compiled several
# times over.
_VECTORS = ["labels", "temperature", "logps", "log_z", "entropy", "d_logps", "d_entropy"]


@triton.jit(do_not_specialize=_VECTORS)
def _statistics_kernel(
    logits,
    labels,
    temperature,
    logps,
    log_z,
    entropy,
    stride,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a row's offset can be beyond 2**31
    logits += row * stride
    inverse = tl.div_rn(1.0, tl.load(temperature + row).to(tl.float32))
    to_log2 = inverse * 1.4426950408889634
    # A thread loads WIDTH columns at once and keeps, for each of its positions in the block, a
    # maximum, a sum of exponentials and a sum of exponentials times shifted logits: threads meet
    # after the loop only. Shifts are kept finite, since -inf - -inf and 0 * -inf are nan; a logit
    # that is nan makes the sums nan.
    columns = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    largest = tl.full([BLOCK // WIDTH], -1e30, tl.float32)
    total = tl.zeros([BLOCK // WIDTH], tl.float32)
    weighted = tl.zeros([BLOCK // WIDTH], tl.float32)
    for start in range(0, VOCAB_SIZE, BLOCK):
        at = start + columns
        x = tl.load(logits + at, mask=at < VOCAB_SIZE, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(x, axis=1))
        # A larger maximum scales the sums so far by `keep`, and shifts the logits in `weighted`.
        fall = largest - new_largest
        keep = tl.exp2(fall * to_log2)
        shifted = tl.maximum(x - new_largest[:, None], -1e30, propagate_nan=tl.PropagateNan.ALL)
        exponentials = tl.exp2(shifted * to_log2)
        weighted = keep * (weighted + fall * total) + tl.sum(exponentials * shifted, axis=1)
        total = keep * total + tl.sum(exponentials, axis=1)
        largest = new_largest
    # The same once more, from the positions of the block to the row.
    row_largest = tl.max(largest)
    fall = largest - row_largest
    keep = tl.exp2(fall * to_log2)
    row_weighted = tl.sum(keep * (weighted + fall * total)) * inverse
    row_total = tl.sum(keep * total)
    log_total = tl.log(row_total)
    label = tl.load(labels + row)
    is_label = (label >= 0) & (label < VOCAB_SIZE)
    label_logit = tl.load(logits + label, mask=is_label, other=float("nan")).to(tl.float32)
    tl.store(logps + row, (label_logit - row_largest) * inverse - log_total)
    tl.store(log_z + row, row_largest * inverse + log_total)
    tl.store(entropy + row, log_total - row_weighted / row_total)


@triton.jit(do_not_specialize=_VECTORS)
def _gradient_kernel(
    logits,
    out,
    labels,
    temperature,
    log_z,
    entropy,
    d_logps,
    d_entropy,
    logits_stride,
    out_stride,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # a row's offset can be beyond 2**31
    logits += row * logits_stride
    out += row * out_stride
    label = tl.load(labels + row).to(tl.int32)
    inverse = tl.div_rn(1.0, tl.load(temperature + row).to(tl.float32))
    row_log_z = tl.load(log_z + row)
    scale = tl.load(d_logps + row) * inverse
    active = scale != 0
    if d_entropy is not None:
        row_entropy = tl.load(entropy + row)
        entropy_scale = tl.load(d_entropy + row) * inverse
        active = active | (entropy_scale != 0)
    # A row without a coefficient is zeroed, whatever it holds.
    num_read = tl.where(active, VOCAB_SIZE, 0)
    for start in range(0, VOCAB_SIZE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < num_read, other=float("-inf")).to(tl.float32)
        # The gradient is written where logits were. Entries as wide as those are each written by
        # the thread that has read them (were it another, the value would have reached it through
        # a barrier). Narrower ones overwrite logits of this block or of one before, which other
        # threads read: past the barrier, all of them have.
        if out.dtype != logits.dtype:
            tl.debug_barrier()
        all_logps = x * inverse - row_log_z
        p = tl.exp2(all_logps * 1.4426950408889634)
        entries = tl.where(at == label, scale, 0.0) - scale * p
        if d_entropy is not None:
            entries -= entropy_scale * p * (tl.maximum(all_logps, -1e30) + row_entropy)
        tl.store(out + at, tl.where(at < num_read, entries, 0.0), mask=at < VOCAB_SIZE)


KERNELS = RowKernels("triton", rows.product, statistics, gradient, rows.accumulate)
