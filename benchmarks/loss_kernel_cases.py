"""The inputs of ``loss_kernel.py``: documents, hidden states, a head, and the exact results.

T tokens, H hidden, V vocabulary, D documents. ``m`` is the share of each document's rows without a
label, ``f`` the share of rows in documents without advantage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

TOP_PROBABILITY = 0.8  # mean over the rows, as a trained model's
EVEN_LENGTH = 256  # rows of a document where all are of one length
_ROWS_AT_A_TIME = 512  # whose logits in float64 are held


@dataclass
class Case:
    """Inputs of one measurement. Rows of a document stand together."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [T]
    labelled: Tensor  # [T] bool
    lengths: list[int]  # [D] rows of each document
    advantages: Tensor  # [D]
    old_logps: Tensor  # [T], float32

    def __post_init__(self) -> None:
        device = self.hidden.device
        num_documents = len(self.lengths)
        document = torch.arange(num_documents).repeat_interleave(torch.tensor(self.lengths))
        self.document = document.to(device)  # [T]
        label_counts = torch.zeros(num_documents, device=device)
        self.label_counts = label_counts.index_add(0, self.document, self.labelled.float())  # [D]
        self.host_counts = [int(count) for count in self.label_counts.tolist()]
        self.label_rows = self.labelled.nonzero().squeeze(-1)
        self.temperature = torch.ones_like(self.old_logps)

    def loss(
        self,
        logps: Tensor,  # [N]
        rows: Tensor | slice = slice(None),  # [N]
    ) -> Tensor:
        """Return the objective of ``rows``: clipped token ratios, divided already."""
        document = self.document[rows]
        ratio = (logps - self.old_logps[rows]).exp()
        advantage = self.advantages[document] / (self.label_counts[document] * len(self.lengths))
        surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return torch.where(self.labelled[rows], surrogate, 0.0).sum()


@dataclass
class Exact:
    """The truth about a case, in float64."""

    logps: Tensor  # [T]
    d_hidden: Tensor  # [T, H]
    d_weight: Tensor  # [V, H]


def make_case(
    shape: tuple[int, int, int],  # T, H, V
    m: float,
    f: float,
    *,
    lengths: tuple[int, int] | None,
    dtype: torch.dtype,
    device: str,
) -> Case:
    """Draw a case; hidden states and head are the same whatever the lengths.

    Args:
        shape: T, H, V.
        m: Share of each document's rows without a label.
        f: Share of rows in documents without advantage.
        lengths: Median and longest document, in rows; None for documents of one length.
        dtype: Of hidden states and head.
        device: Where the case lies. It is drawn on the CPU.
    """
    num_tokens, hidden_size, vocab_size = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * hidden_size**-0.5
    likely = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    noise = torch.randn(num_tokens, hidden_size, generator=generator)
    hidden = _sharpness(vocab_size, hidden_size) * weight[likely] + noise
    other = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    is_likely = torch.rand(num_tokens, generator=generator) < TOP_PROBABILITY
    labels = torch.where(is_likely, likely, other)
    document_lengths = _draw_lengths(num_tokens, lengths, generator)
    labelled = torch.cat([torch.arange(length) >= round(m * length) for length in document_lengths])
    advantages = _draw_advantages(document_lengths, f, generator)
    case = Case(
        hidden=hidden.to(device, dtype),
        weight=weight.to(device, dtype),
        labels=labels.to(device),
        labelled=labelled.to(device),
        lengths=document_lengths,
        advantages=advantages.to(device),
        old_logps=torch.zeros(num_tokens, device=device),
    )
    case.old_logps = exact_logps(case).float()
    return case


@cache
def _sharpness(vocab_size: int, hidden_size: int) -> float:
    """Return how much of the likely token's row a hidden state has to hold.

    By bisection, so that the mean top probability is 0.8.
    """
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * hidden_size**-0.5
    noise = torch.randn(128, hidden_size, generator=generator)
    low = 0.0
    high = 64.0
    for _ in range(12):
        middle = (low + high) / 2
        logits = (middle * weight[:128] + noise) @ weight.T
        if logits.softmax(-1).amax(-1).mean() < TOP_PROBABILITY:
            low = middle
        else:
            high = middle
    return low


def _draw_lengths(
    num_tokens: int, lengths: tuple[int, int] | None, generator: torch.Generator
) -> list[int]:
    """Return the rows of each document: log-normal with a median and a longest, or all even."""
    if lengths is None:
        return [EVEN_LENGTH] * (num_tokens // EVEN_LENGTH)
    median, longest = lengths
    drawn: list[int] = []
    num_left = num_tokens
    while num_left > 0:
        length = median * torch.exp(0.8 * torch.randn((), generator=generator))
        drawn.append(min(int(length.clamp(8, longest)), num_left))
        num_left -= drawn[-1]
    return drawn


def _draw_advantages(lengths: list[int], f: float, generator: torch.Generator) -> Tensor:  # [D]
    """Return advantages, of which some are 0: a share ``f`` of the rows, as the work is by rows."""
    advantages = torch.randn(len(lengths), generator=generator)
    num_dead = 0
    for document in torch.randperm(len(lengths), generator=generator).tolist():
        if num_dead + lengths[document] / 2 < f * sum(lengths):
            advantages[document] = 0
            num_dead += lengths[document]
    return advantages


def _row_slices(case: Case) -> Iterator[slice]:
    for start in range(0, case.labels.numel(), _ROWS_AT_A_TIME):
        yield slice(start, start + _ROWS_AT_A_TIME)


def exact(case: Case) -> Exact:
    """Return log-probabilities and gradients in float64."""
    return Exact(exact_logps(case), *_exact_gradients(case))


@torch.no_grad()
def exact_logps(case: Case) -> Tensor:  # [T]
    """Return log-probabilities in float64."""
    weight = case.weight.double()
    logps = []
    for rows in _row_slices(case):
        all_logps = (case.hidden[rows].double() @ weight.T).log_softmax(-1)
        logps.append(all_logps.gather(-1, case.labels[rows, None]).squeeze(-1))
    return torch.cat(logps)


def _exact_gradients(case: Case) -> tuple[Tensor, Tensor]:  # [T, H], [V, H]
    """Return the gradients of hidden states and head in float64."""
    logps = case.old_logps.double().requires_grad_()
    (coefficients,) = torch.autograd.grad(case.loss(logps), logps)
    weight = case.weight.double()
    d_hidden = torch.zeros_like(case.hidden, dtype=torch.float64)
    d_weight = torch.zeros_like(weight)
    for rows in _row_slices(case):
        hidden = case.hidden[rows].double()
        gradient = -coefficients[rows, None] * (hidden @ weight.T).softmax(-1)
        gradient[torch.arange(hidden.shape[0]), case.labels[rows]] += coefficients[rows]
        d_hidden[rows] = gradient @ weight
        d_weight += gradient.T @ hidden
    return d_hidden, d_weight
