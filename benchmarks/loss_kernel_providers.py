"""The loss heads that ``loss_kernel.py`` compares: this pack's, plain torch's and other packages'.

Each is ``run(case, hidden, weight) -> (loss, logps)``, whose backward gives the gradients of both
tensors. ``logps`` [T] are for the comparison with float64, None where a package does not show them.
Other packages are imported when they run; they come with ``pip install 'gspo[bench]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from loss_kernel_cases import Case
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gspo.kernels import linear_logps, linear_loss, logits_logps

PLAIN_ROWS = 512  # whose logits the shortest one-phase head holds
COMPILED_ROWS = 1024  # in a chunk of compiled plain torch

Run = Callable[[Case, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Provider:
    """A loss head to measure."""

    name: str
    run: Run
    packed: bool = True  # it takes documents of any length; others get documents of one length
    devices: tuple[str, ...] = ("cpu", "cuda")


def ours_loss(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run our one-phase head: the gradients are done with the forward."""
    rows = case.label_rows

    def loss_function(
        logps: Tensor, entropy: Tensor, first: int, last: int
    ) -> tuple[Tensor, Tensor]:
        start = sum(case.host_counts[:first])
        return case.loss(logps, rows[start : start + logps.numel()]), logps

    loss, chunk_logps = linear_loss(
        hidden.index_select(0, rows),
        weight,
        case.labels[rows],
        case.temperature[rows],
        case.host_counts,
        loss_function,
    )
    return loss, _spread(case, torch.cat(chunk_logps))


def ours_logps(kernel: str) -> Run:
    """Return our two-phase head with one of its backends."""

    def run(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = case.label_rows
        logps, _ = linear_logps(
            hidden.index_select(0, rows),
            weight,
            case.labels[rows],
            case.temperature[rows],
            kernel=kernel,
        )
        return case.loss(logps, rows), _spread(case, logps)

    return run


def _spread(case: Case, logps: Tensor) -> Tensor:  # [T]
    """Return the log-probabilities of labelled rows among zeros for the others."""
    zeros = case.old_logps.new_zeros(case.labels.numel())
    return zeros.index_put((case.label_rows,), logps.detach())


def ours_logits(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run our head on all logits, overwritten by their gradient: three products."""
    logits = hidden @ weight.T
    logps, _ = logits_logps(logits, case.labels, case.temperature)
    return case.loss(logps), logps


class _KnownGradients(torch.autograd.Function):
    """Gives a loss the gradients that are known already."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, loss: Tensor, d_hidden: Tensor, d_weight: Tensor
    ) -> Tensor:
        ctx.gradients = (d_hidden, d_weight)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.gradients
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss), None, None, None


def plain(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run one phase in plain torch, as short as can be: one buffer, not compiled, no entropy.

    The objective takes tokens one by one here, so a document may lie in two chunks.
    """
    head = _PlainHead(case, hidden.detach(), weight.detach())
    for rows in case.label_rows.split(PLAIN_ROWS):
        head.add(rows)
    loss = _KnownGradients.apply(hidden, weight, head.loss, head.d_hidden, head.d_weight)
    return loss, _spread(case, torch.cat(head.logps))


class _PlainHead:
    """The buffer and the sums of :func:`plain`."""

    def __init__(self, case: Case, hidden: Tensor, weight: Tensor) -> None:
        self.case = case
        self.hidden = hidden
        self.weight = weight
        self.buffer = hidden.new_empty(PLAIN_ROWS, weight.shape[0])
        self.d_hidden = torch.zeros_like(hidden)
        self.d_weight = torch.zeros_like(weight)
        self.loss = hidden.new_zeros(())
        self.logps: list[Tensor] = []

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:  # [N]
        """Add the loss and the gradients of some rows."""
        hidden = self.hidden[rows]
        labels = self.case.labels[rows, None]
        # From logits to exponentials in place.
        p = torch.mm(hidden, self.weight.T, out=self.buffer[: rows.numel()])
        label_logits = p.gather(-1, labels)
        largest = p.amax(-1, keepdim=True)
        total = p.sub_(largest).exp_().sum(-1, keepdim=True)
        logps = (label_logits - largest - total.log()).squeeze(-1)
        coefficients = self._differentiate(logps.requires_grad_(), rows)
        active = coefficients.nonzero().squeeze(-1)
        if active.numel() < rows.numel():
            p, hidden, labels = p[active], hidden[active], labels[active]
            coefficients, total = coefficients[active], total[active]
        p.mul_(-coefficients[:, None] / total)
        p.scatter_add_(-1, labels, coefficients[:, None])
        self.d_hidden[rows[active]] = p @ self.weight
        self.d_weight.addmm_(p.T, hidden)

    def _differentiate(self, logps: Tensor, rows: Tensor) -> Tensor:  # [N]
        """Add the loss of some rows; return its gradient by their log-probabilities."""
        with torch.enable_grad():
            loss = self.case.loss(logps, rows)
            (coefficients,) = torch.autograd.grad(loss, logps)
        self.loss += loss.detach()
        self.logps.append(logps)
        return coefficients


def _eager_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return log-probabilities from all logits, a log-softmax in float32 and a gather."""
    all_logps = (hidden @ weight.T).float().log_softmax(-1)
    return all_logps.gather(-1, labels[:, None]).squeeze(-1)


def eager(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run plain torch on all rows at once."""
    logps = _eager_logps(hidden, weight, case.labels)
    return case.loss(logps), logps


@cache
def _compiled_logps() -> Callable[..., Tensor]:
    return torch.compile(_eager_logps)


def compiled_chunks(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run torch.compile'd chunks, computed again in the backward."""
    chunks = zip(hidden.split(COMPILED_ROWS), case.labels.split(COMPILED_ROWS), strict=True)
    logps = []
    for chunk_hidden, chunk_labels in chunks:
        compiled = _compiled_logps()
        chunk = checkpoint(compiled, chunk_hidden, weight, chunk_labels, use_reentrant=False)
        logps.append(chunk)
    all_logps = torch.cat(logps)
    return case.loss(all_logps), all_logps


def trl(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run TRL's selective log-softmax on all logits."""
    from trl.trainer.utils import selective_log_softmax

    logits = hidden @ weight.T
    logps = selective_log_softmax(logits[None], case.labels[None])[0]
    return case.loss(logps), logps


@cache
def _liger_loss(chunk_size: int) -> torch.nn.Module:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=True,
        use_ref_model=False,
        chunk_size=chunk_size,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type="grpo",
    )


def liger(chunk_size: int) -> Run:
    """Return Liger's fused linear GRPO, ``chunk_size`` documents at a time."""

    def run(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        shape = (len(case.lengths), case.lengths[0])
        loss, _ = _liger_loss(chunk_size)(
            hidden.view(*shape, -1),
            weight,
            case.labels.view(shape),
            case.labelled.view(shape).long(),
            case.advantages,
            old_per_token_logps=case.old_logps.view(shape),
        )
        return loss, None

    return run


def liger_triton(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run Liger's Triton GRPO on all logits."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    shape = (len(case.lengths), case.lengths[0])
    logits = (hidden @ weight.T).view(*shape, -1)
    logits = torch.cat((logits, logits[:, -1:]), 1)  # it drops the last position
    token_losses, *_ = triton_grpo_loss(
        logits,
        case.old_logps.view(shape),
        None,
        case.labels.view(shape),
        case.advantages,
        completion_mask=case.labelled.view(shape).long(),
        temperature=1.0,
        beta=0.0,
        eps_low=0.2,
        eps_high=0.2,
        inplace=True,
    )
    weights = case.label_counts[:, None] * len(case.lengths)
    return (token_losses / weights).sum(), None


def verl(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run verl's Triton linear cross entropy."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logps, _ = linear_cross_entropy(hidden, weight, case.labels, 1.0, "none")
    return case.loss(logps), logps


PROVIDERS = (
    Provider("gspo linear_loss", ours_loss),
    Provider("gspo linear_logps", ours_logps("auto")),
    Provider("gspo logits_logps", ours_logits),
    Provider("gspo reference", ours_logps("reference")),
    Provider("plain one phase", plain),
    Provider("eager", eager),
    Provider("compiled chunks", compiled_chunks),
    Provider("trl selective_log_softmax", trl),
    Provider("liger fused linear, 1 document", liger(1), packed=False),
    Provider("liger fused linear, 4 documents", liger(4), packed=False),
    Provider("liger triton", liger_triton, packed=False, devices=("cuda",)),
    Provider("verl triton", verl, devices=("cuda",)),
)
