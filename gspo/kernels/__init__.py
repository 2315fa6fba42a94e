"""The loss head: from hidden states and the LM-head weight to log-probabilities, without holding ``T x V``.

:func:`linear_logps` and :func:`logits_logps` are autograd ops of their own; :func:`linear_loss` is what a policy uses
where documents are whole. ``kernel`` names the backend: ``triton``, ``compile``, ``reference``, or ``auto``, which
:func:`choose_kernel` resolves.
"""

from __future__ import annotations

import logging
import os
import shutil
from functools import cache

from torch import Tensor

from gspo.errors import InputError
from gspo.kernels import head, reference, rows
from gspo.types import MetricSums

__all__ = [
    "KERNELS",
    "choose_kernel",
    "linear_logps",
    "linear_loss",
    "logits_logps",
    "rows_per_chunk",
]

KERNELS = ("auto", "triton", "compile", "reference")
_SMALL_VOCABULARY = 4096  # below, a chunk of plain torch takes no time that is worth a compilation
_CPU_BUFFER = (
    96 * 2**20
)  # bytes of a chunk's logits: products of fewer rows are slower, of 300 by a tenth
_GPU_ROWS = 4096  # enough to fill a product with any vocabulary

logger = logging.getLogger(__name__)


@cache
def choose_kernel(kernel: str, device_type: str, vocab_size: int) -> str:
    """The backend that ``kernel`` means for this device and vocabulary; ``auto``'s choice is logged once.

    Raises:
        InputError: a name that is not known, or a backend that cannot run here.
    """
    if kernel not in KERNELS:
        raise InputError(f"kernel is {kernel!r}: it must be one of {', '.join(KERNELS)}.")
    if kernel == "triton" and device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"kernel is 'triton', which needs a CUDA device, not {device_type}: set it to 'auto'."
        )
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if kernel == "compile" and device_type == "cpu" and not compiler:
        raise InputError(
            "kernel is 'compile', which needs a C++ compiler: install g++, or set it to 'auto'."
        )
    if kernel != "auto":
        return kernel
    if device_type == "cuda":
        chosen, why = "triton", "a CUDA device"
    elif vocab_size < _SMALL_VOCABULARY:
        chosen, why = "reference", f"a vocabulary of {vocab_size}"
    elif device_type == "cpu" and not compiler:
        chosen, why = "reference", "no C++ compiler; with g++ it would be compile"
    else:
        chosen, why = "compile", f"a {device_type} device"
    logger.info("kernel: auto is %s here (%s).", chosen, why)
    return chosen


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """Rows whose logits are held at a time where no ``chunk_size`` is given."""
    if device_type == "cpu":
        return max(_CPU_BUFFER // (4 * vocab_size), 16)
    return _GPU_ROWS


def linear_logps(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    *,
    chunk_size: int | None = None,
    entropy_grad: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:  # [T], [T] float32
    """Log-probability of each label, and entropy, of ``softmax(hidden @ weight.T / temperature)``, in nats.

    The backward takes only the rows whose log-probability or entropy has a gradient other than 0, and computes their
    logits again: 4 - 3f products of all rows with the weight, f being the share of rows without.

    Args:
        hidden: float32 or bf16; statistics are taken from float32 logits.
        weight: of the LM head, gathered if it was sharded. Its gradient is summed in float32.
        labels: next tokens, in [0, V).
        temperature: of each row, not differentiated.
        chunk_size: rows whose logits are held at a time; None chooses by device.
        entropy_grad: lets gradients flow through the entropy.
        kernel: ``auto``, ``triton``, ``compile`` or ``reference``.

    Raises:
        InputError: a kernel that is not known or cannot run here.
        ValueError: the inputs are not of as many rows.
    """
    _check_rows(hidden, labels, temperature)
    chunk_size, kernels = _settle(weight, chunk_size, kernel)
    if kernels is None:
        return reference.linear_logps(
            hidden, weight, labels, temperature, chunk_size=chunk_size, entropy_grad=entropy_grad
        )
    return head.linear_logps(
        hidden,
        weight,
        labels,
        temperature,
        kernels=kernels,
        chunk_size=chunk_size,
        entropy_grad=entropy_grad,
    )


def linear_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    label_counts: list[int],  # rows of each document, which stand one after another
    seam: head.Seam,
    *,
    chunk_size: int | None = None,
    entropy_grad: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, list[MetricSums]]:
    """The loss sum of whole documents, and the metric sums of each chunk of them.

    The gradients are done when it returns: 3 - 2f products of all rows with the weight, f being the share of rows
    whose gradient is exactly 0 (clipped, or without advantage). Backward once.

    Args:
        hidden: see :func:`linear_logps`, as are the next three and the last three.
        weight: see there.
        labels: see there.
        temperature: see there.
        label_counts: on the host.
        seam: ``(logps, entropy, first, last)``, of the rows of documents ``first`` to ``last - 1``, to their undivided
            loss sum and metric sums; plain torch, additive over documents. It is differentiated by ``logps`` and
            ``entropy`` alone: parameters of its own get no gradient.
        chunk_size: see there; chunks hold whole documents, and a longer document costs one product more, of its rows
            that have a gradient.
        entropy_grad: the loss depends on the entropy.
        kernel: see there.

    Raises:
        InputError: a kernel that is not known or cannot run here.
        ValueError: ``label_counts`` are not those of the rows, or the inputs are not of as many rows.
    """
    if sum(label_counts) != labels.numel() or min(label_counts, default=0) < 0:
        raise ValueError(
            f"label_counts add up to {sum(label_counts)}, but there are {labels.numel()} labels"
        )
    _check_rows(hidden, labels, temperature)
    chunk_size, kernels = _settle(weight, chunk_size, kernel)
    if kernels is None:
        logps, entropy = reference.linear_logps(
            hidden, weight, labels, temperature, chunk_size=chunk_size, entropy_grad=entropy_grad
        )
        loss, metrics = seam(logps, entropy, 0, len(label_counts))
        return loss, [metrics]
    return head.linear_loss(
        hidden,
        weight,
        labels,
        temperature,
        label_counts,
        seam,
        kernels=kernels,
        chunk_size=chunk_size,
        entropy_grad=entropy_grad,
    )


def logits_logps(
    logits: Tensor,  # [T, V]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    *,
    entropy_grad: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:  # [T], [T] float32
    """:func:`linear_logps` for logits that are there already. But for ``reference``, the backward overwrites them.

    Raises:
        InputError: a kernel that is not known or cannot run here.
        ValueError: the inputs are not of as many rows.
    """
    _check_rows(logits, labels, temperature)
    _, kernels = _settle(logits, 1, kernel, vocab_size=logits.shape[-1])
    if kernels is None:
        return reference.logits_logps(logits, labels, temperature, entropy_grad=entropy_grad)
    return head.logits_logps(
        logits, labels, temperature, kernels=kernels, entropy_grad=entropy_grad
    )


def _check_rows(rows_of: Tensor, labels: Tensor, temperature: Tensor) -> None:
    sizes = rows_of.shape[0], labels.numel(), temperature.numel()
    if len(set(sizes)) > 1:
        raise ValueError(
            f"there are {sizes[0]} rows, {sizes[1]} labels and {sizes[2]} temperatures: one each is needed"
        )


def _settle(
    weight: Tensor, chunk_size: int | None, kernel: str, vocab_size: int | None = None
) -> tuple[int, rows.RowKernels | None]:
    """Rows of a chunk, and the backend's operations, None for the reference."""
    if hasattr(weight, "full_tensor"):  # a DTensor
        raise TypeError(
            "the loss head needs the whole weight: call it inside the forward of the FSDP root"
        )
    device_type, vocab_size = weight.device.type, vocab_size or weight.shape[0]
    chosen = choose_kernel(kernel, device_type, vocab_size)
    chunk_size = chunk_size or rows_per_chunk(vocab_size, device_type)
    if chosen == "reference":
        return chunk_size, None
    if chosen == "triton":
        from gspo.kernels import triton  # imports triton, which is there on Linux only

        return chunk_size, triton.KERNELS
    return chunk_size, rows.compiled()
