"""What a loss sees of a microbatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _here(sums: Tensor) -> Tensor:
    """Documents that are whole on this rank have their sums here."""
    return sums


@dataclass(frozen=True, slots=True)
class Segments:
    """Parts of documents with a ratio of their own: turns, reasoning steps. Every labelled token is in one of them."""

    index: Tensor  # [T] int64 in [0, K)
    document: Tensor  # [K] int64 in [0, D)
    label_counts: Tensor  # [K] int64 over all context ranks, 0 where there is none


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What an objective needs beside the new log-probabilities; ``label_counts`` 0 marks padding.

    Under context parallelism the tokens are those of this rank, and the documents all those that it may hold a part of,
    the same on the ranks of a context group. An objective's value and metrics add up over these ranks, so what is per
    document is added up where it is ``counted``; its gradient is that of the whole objective by the tokens here.
    """

    document_index: Tensor  # [T] int64 in [0, D)
    loss_mask: Tensor  # [T] bool, True = trained
    old_logps: Tensor  # [T] nats
    advantages: Tensor  # [D]
    label_counts: Tensor  # [D] int64
    ref_logps: Tensor | None = None  # [T] nats
    counted: Tensor | None = (
        None  # [D] bool, each document on one rank of its context group; None: all of them
    )
    complete: Callable[[Tensor], Tensor] = (
        _here  # [..., K] sums over the tokens here, to sums over all; same gradient
    )
    segments: Segments | None = (
        None  # all of them on every rank of a context group, as documents are
    )
    token_advantages: Tensor | None = (
        None  # [T], in place of the documents'; a larger unit has the mean of its tokens'
    )
    sampler_logps: Tensor | None = (
        None  # [T] nats, of the sampler, where ``old_logps`` are the trainer's own
    )


def find_segments(
    index: Tensor,  # [T] int64 >= 0, whatever where there is no label
    document_index: Tensor,  # [T]
    loss_mask: Tensor,  # [T] bool
) -> Segments:
    """The segments of whole documents.

    Raises:
        ValueError: a segment has labels in two documents.
    """
    labelled, documents = index[loss_mask], document_index[loss_mask]
    counts = torch.bincount(labelled)
    document = torch.zeros_like(counts).scatter(0, labelled, documents)
    if not torch.equal(document[labelled], documents):
        raise ValueError(
            "segment_index: a segment lies in two documents; number segments through the batch"
        )
    return Segments(torch.where(loss_mask, index, 0), document, counts)
