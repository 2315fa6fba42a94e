"""The interface of a loss: its inputs, its output, and what it declares about itself.

T tokens, D documents, K segments. The recipe, the policy and the replay ask a loss nothing but what
:class:`Loss` and :class:`LossTraits` say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gspo.metrics import Metrics, NotFinite
from gspo.types import Axis, FieldSpec, field_specs


def _over(axis: Axis, *, default: Any = MISSING, numbers: Axis | None = None) -> Any:
    return field(default=default, metadata={"spec": FieldSpec(axis, numbers)})


def whole_here(sums: Tensor) -> Tensor:
    """Return sums over documents that are whole on this rank: they are complete."""
    return sums


@dataclass(frozen=True, slots=True)
class Segments:
    """Parts of documents with a ratio of their own: turns, reasoning steps.

    Every labelled token is in one of them.
    """

    index: Tensor  # [T] int64 in [0, K)
    document: Tensor  # [K] int64 in [0, D)
    label_counts: Tensor  # [K] int64 over all context ranks, 0 where there is none

    def of_documents(self, rows: slice, first: int, last: int) -> Segments:
        """Return the segments of documents ``first`` to ``last - 1``, whose tokens are ``rows``.

        The other segments keep their numbers and are left without labels.
        """
        is_inside = (self.document >= first) & (self.document < last)
        document = torch.where(is_inside, self.document - first, 0)
        label_counts = torch.where(is_inside, self.label_counts, 0)
        return Segments(self.index[rows], document, label_counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The tensors that an objective takes beside the new log-probabilities.

    A ``label_counts`` of 0 marks padding.

    Under context parallelism the tokens are those of this rank, and the documents all those that it
    may hold a part of, the same on the ranks of a context group. An objective's value and metrics
    add up over these ranks, so what is per document is added up where it is ``counted``; its
    gradient is that of the whole objective by the tokens here.
    """

    # [T] int64 in [0, D)
    document_index: Tensor = _over(Axis.SLOT, numbers=Axis.DOCUMENT)
    # [T] bool, True = trained
    loss_mask: Tensor = _over(Axis.SLOT)
    # [T] nats
    old_logps: Tensor = _over(Axis.SLOT)
    # [D]
    advantages: Tensor = _over(Axis.DOCUMENT)
    # [D] int64
    label_counts: Tensor = _over(Axis.DOCUMENT)
    # [T] nats
    ref_logps: Tensor | None = _over(Axis.SLOT, default=None)
    # [T] nats, of the sampler, where old_logps are the trainer's own
    sampler_logps: Tensor | None = _over(Axis.SLOT, default=None)
    # [T], in place of the documents'; a larger unit has the mean of its tokens'
    token_advantages: Tensor | None = _over(Axis.SLOT, default=None)
    # [D] bool, each document on one rank of its context group; None: all of them
    counted: Tensor | None = _over(Axis.DOCUMENT, default=None)
    # all of them on every rank of a context group, as documents are
    segments: Segments | None = None
    # [..., K] sums over the tokens here, to sums over all ranks; the gradient passes as it is
    complete: Callable[[Tensor], Tensor] = whole_here

    def of_documents(self, label_counts: list[int], first: int, last: int) -> LossInputs:
        """Return the inputs of documents ``first`` to ``last - 1``.

        Args:
            label_counts: tokens of every document, which stand one after another, on the host.
            first: number of the first document.
            last: number behind the last one.
        """
        if first == 0 and last == len(label_counts):
            return self
        start = sum(label_counts[:first])
        rows = slice(start, start + sum(label_counts[first:last]))
        changed: dict[str, Any] = {}
        for name, spec in field_specs(LossInputs).items():
            values = getattr(self, name)
            if values is None:
                continue
            of_part = rows if spec.axis == Axis.SLOT else slice(first, last)
            values = values[of_part]
            if spec.numbers == Axis.DOCUMENT:
                values = values - first
            changed[name] = values
        if self.segments is not None:
            changed["segments"] = self.segments.of_documents(rows, first, last)
        return replace(self, **changed)


class LossOutput(NamedTuple):
    """The result of a loss; a plain ``(loss, metrics)`` of the user's will do too."""

    loss: Tensor  # [] undivided sum
    metrics: Metrics
    not_finite: NotFinite | None = None  # documents that left the sum; None: it takes none out


@dataclass(frozen=True, slots=True)
class LossTraits:
    """Facts about a loss that steer the code around it; a loss has them as ``traits``."""

    ratio_unit: Axis | None = None  # what has one ratio: a slot (token), a document or a segment
    entropy_grad: bool = False  # the loss has a gradient by the entropy
    has_clip_range: bool = True  # a ratio can lie outside it
    needs: Mapping[str, str] = field(default_factory=dict)  # option -> the input that it needs


class Loss(Protocol):
    """A loss component. ``traits`` is optional, see :func:`traits_of`."""

    def __call__(self, logps: Tensor, entropy: Tensor, inputs: LossInputs) -> Any:
        """Return a :class:`LossOutput` of whole documents; the first two are [T] in nats."""
        ...

    def denominator(self, num_documents: int, num_label_tokens: int) -> float:
        """Return what the loss sum is divided by, from the totals of the optimizer step."""
        ...


def traits_of(loss: Any) -> LossTraits:
    """Return what a loss declares about itself, or the defaults for one that declares nothing."""
    return getattr(loss, "traits", LossTraits())


def find_segments(
    index: Tensor,  # [T] int64 >= 0, any value where there is no label
    document_index: Tensor,  # [T]
    loss_mask: Tensor,  # [T] bool
) -> Segments:
    """Return the segments of whole documents.

    Raises:
        ValueError: A segment has labels in two documents.
    """
    labelled = index[loss_mask]
    documents = document_index[loss_mask]
    counts = torch.bincount(labelled)
    document = torch.zeros_like(counts).scatter(0, labelled, documents)
    if not torch.equal(document[labelled], documents):
        raise ValueError(
            "segment_index: a segment lies in two documents; number segments through the batch"
        )
    return Segments(torch.where(loss_mask, index, 0), document, counts)
