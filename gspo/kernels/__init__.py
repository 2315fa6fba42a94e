"""The loss head: from hidden states and the LM-head weight to log-probabilities.

The logits of all rows, ``T x V``, are never held. :func:`linear_logps` and :func:`logits_logps` are
autograd ops of their own; :func:`linear_loss` is what a policy uses where documents are whole.
``kernel`` names the backend: ``triton``, ``compile``, ``reference``, or ``auto``, which
:func:`choose_kernel` resolves.

T tokens (rows), H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gspo.kernels import head, reference, rows
from gspo.kernels.choice import KERNELS, choose_kernel, rows_per_chunk
from gspo.kernels.head import LossFunction, Result

__all__ = [
    "KERNELS",
    "LossFunction",
    "choose_kernel",
    "linear_logps",
    "linear_loss",
    "logits_logps",
    "rows_per_chunk",
]


def linear_logps(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    *,
    chunk_size: int | None = None,
    entropy_grad: bool = False,
    softcap: float | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:  # [T], [T] float32
    """Return each label's log-probability, and the entropies, in nats.

    The distribution is ``softmax(hidden @ weight.T / temperature)``. The backward takes only the
    rows whose log-probability or entropy has a gradient other than 0, and computes their logits
    again: 4 - 3f products of all rows with the weight, f being the share of rows without.

    Args:
        hidden: float32 or bf16; statistics are taken from float32 logits.
        weight: The LM head's, gathered if it was sharded. Its gradient is summed in float32.
        labels: Next tokens, in [0, V).
        temperature: One for each row, not differentiated.
        chunk_size: Rows whose logits are held at a time; None chooses by device.
        entropy_grad: Lets gradients flow through the entropy.
        softcap: Bound c of the logits, which become ``c * tanh(logit / c)`` before the temperature
            divides them; None for none.
        kernel: ``auto``, ``triton``, ``compile`` or ``reference``.

    Raises:
        InputError: A kernel that is not known or cannot run here.
        ValueError: The inputs differ in their number of rows.
    """
    _check_rows(hidden, labels, temperature)
    backend = _resolve_backend(weight, weight.shape[0], chunk_size, kernel)
    row_inputs = (hidden, weight, labels, temperature)
    if backend.kernels is None:
        return reference.linear_logps(
            *row_inputs,
            chunk_size=backend.chunk_size,
            entropy_grad=entropy_grad,
            softcap=softcap,
        )
    return head.linear_logps(
        *row_inputs,
        kernels=backend.kernels,
        chunk_size=backend.chunk_size,
        entropy_grad=entropy_grad,
        softcap=softcap,
    )


def linear_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    label_counts: list[int],  # [D] rows of each document; documents stand one after another
    loss_function: LossFunction[Result],
    *,
    chunk_size: int | None = None,
    entropy_grad: bool = False,
    softcap: float | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, list[Result]]:  # []
    """Return the loss sum of whole documents, and the loss function's other result of each chunk.

    The gradients are done when it returns: 3 - 2f products of all rows with the weight, f being the
    share of rows whose gradient is exactly 0 (clipped, or without advantage). The backward only
    scales them, and can be called once.

    Args:
        hidden: See :func:`linear_logps`, as for the next three and the last four.
        weight: See there.
        labels: See there.
        temperature: See there.
        label_counts: On the host.
        loss_function: ``(logps, entropy, first, last)`` of the rows of documents ``first`` to
            ``last - 1`` to ``(undivided loss sum, anything)``. Plain torch, additive over
            documents. It is differentiated by ``logps`` and ``entropy`` alone: parameters of its
            own get no gradient. The second result is handed back as it is.
        chunk_size: See there. Chunks hold whole documents; a document longer than a chunk costs one
            product more, of its rows that have a gradient.
        entropy_grad: The loss depends on the entropy.
        softcap: See there.
        kernel: See there.

    Raises:
        InputError: A kernel that is not known or cannot run here.
        ValueError: ``label_counts`` do not add up to the rows, or the inputs differ in their number
            of rows.
    """
    if sum(label_counts) != labels.numel() or min(label_counts, default=0) < 0:
        raise ValueError(
            f"label_counts add up to {sum(label_counts)}, but there are {labels.numel()} labels"
        )
    _check_rows(hidden, labels, temperature)
    backend = _resolve_backend(weight, weight.shape[0], chunk_size, kernel)
    row_inputs = (hidden, weight, labels, temperature)
    if backend.kernels is None:
        logps, entropy = reference.linear_logps(
            *row_inputs,
            chunk_size=backend.chunk_size,
            entropy_grad=entropy_grad,
            softcap=softcap,
        )
        loss_sum, result = loss_function(logps, entropy, 0, len(label_counts))
        return loss_sum, [result]
    return head.linear_loss(
        *row_inputs,
        label_counts,
        loss_function,
        kernels=backend.kernels,
        chunk_size=backend.chunk_size,
        entropy_grad=entropy_grad,
        softcap=softcap,
    )


def logits_logps(
    logits: Tensor,  # [T, V]
    labels: Tensor,  # [T] int64
    temperature: Tensor,  # [T] > 0
    *,
    entropy_grad: bool = False,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:  # [T], [T] float32
    """Return what :func:`linear_logps` does, from logits that are there already.

    The backward overwrites the logits, unless the kernel is ``reference``.

    Raises:
        InputError: A kernel that is not known or cannot run here.
        ValueError: The inputs differ in their number of rows.
    """
    _check_rows(logits, labels, temperature)
    backend = _resolve_backend(logits, logits.shape[-1], None, kernel)
    if backend.kernels is None:
        return reference.logits_logps(logits, labels, temperature, entropy_grad=entropy_grad)
    return head.logits_logps(
        logits, labels, temperature, kernels=backend.kernels, entropy_grad=entropy_grad
    )


def _check_rows(matrix: Tensor, labels: Tensor, temperature: Tensor) -> None:
    num_rows = matrix.shape[0]
    if labels.numel() != num_rows or temperature.numel() != num_rows:
        raise ValueError(
            f"there are {num_rows} rows, {labels.numel()} labels and {temperature.numel()} "
            "temperatures: one each is needed"
        )


class _Backend(NamedTuple):
    """How a call is computed."""

    chunk_size: int  # rows whose logits are held at a time
    kernels: rows.RowKernels | None  # None: the reference


def _resolve_backend(
    matrix: Tensor, vocab_size: int, chunk_size: int | None, kernel: str
) -> _Backend:
    """Return the backend for the device of ``matrix``, a weight or logits."""
    if hasattr(matrix, "full_tensor"):  # a DTensor
        raise TypeError(
            "the loss head needs the whole weight: call it inside the forward of the FSDP root"
        )
    device_type = matrix.device.type
    chosen = choose_kernel(kernel, device_type, vocab_size)
    chunk_size = chunk_size or rows_per_chunk(vocab_size, device_type)
    if chosen == "reference":
        return _Backend(chunk_size, None)
    if chosen == "triton":
        from gspo.kernels import triton  # imports triton, which is there on Linux only

        return _Backend(chunk_size, triton.KERNELS)
    return _Backend(chunk_size, rows.compiled())
