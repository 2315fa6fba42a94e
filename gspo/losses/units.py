"""The parts of objectives: the policy's drift, units with one ratio, and sums over documents.

T tokens, D documents, K units of the ratio: tokens, segments or documents. Everything is float32 or
float64, whatever the model's dtype. Where a document spans ranks, its sums are completed here and
in :mod:`gspo.losses.accounting`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo.losses.inputs import LossInputs, Segments, whole_here


@dataclass(frozen=True, slots=True)
class DriftTable:
    """Four values of each document or segment, sums or means over its labelled tokens."""

    rows: Tensor  # [4, K], in one tensor so that ranks add up all of them at once

    @property
    def log_ratio(self) -> Tensor:  # [K]
        """Nats, new - old."""
        return self.rows[0]

    @property
    def logps(self) -> Tensor:  # [K]
        """Nats."""
        return self.rows[1]

    @property
    def advantages(self) -> Tensor:  # [K]
        """Sums of the tokens' own advantages; 0 where they have none."""
        return self.rows[2]

    @property
    def mismatch(self) -> Tensor:  # [K]
        """Nats, old - sampler's."""
        return self.rows[3]


@dataclass(frozen=True, slots=True)
class Drift:
    """How far each token's log-probability has moved, and sums; 0 where a token is not trained."""

    log_ratio: Tensor  # [T] nats, new - old
    logps: Tensor  # [T] nats
    mismatch: Tensor  # [T] nats, old - sampler's; 0 where these are the same
    documents: DriftTable  # sums over documents, 0 where not valid
    segments: DriftTable | None  # sums over segments
    valid: Tensor  # [D] bool, documents with a label whose every value is finite
    token_valid: Tensor  # [T] bool, their labelled tokens


@dataclass(frozen=True, slots=True)
class Units:
    """The things with one ratio each: tokens, segments or documents."""

    log_ratio: Tensor  # [K] nats, mean over the unit's labelled tokens; 0 where not valid
    logps: Tensor  # [K] nats, mean; 0 where not valid
    mismatch: Tensor  # [K] nats, mean
    advantages: Tensor  # [K]
    weights: Tensor  # [K], the unit's share in the undivided sum; 0 where not valid
    valid: Tensor  # [K] bool
    counted: Tensor  # [K] bool, valid and added up on this rank
    document: Tensor  # [K] int64
    num_tokens: Tensor  # [K] int64, labelled tokens whose gradient the unit carries
    complete: Callable[[Tensor], Tensor]  # [..., D] sums over the units here, to sums over all


@dataclass(frozen=True, slots=True)
class RatioTerms:
    """The importance ratio of each unit."""

    units: Units
    log_ratio: Tensor  # [K] nats, bounded; 0 where not valid
    bounded: Tensor  # [K] bool, True where the bound changed it


@dataclass(frozen=True, slots=True)
class SurrogateTerms:
    """A surrogate's loss and where its ratio is outside the clip range, over K units."""

    loss: Tensor  # [K]
    outside: Tensor  # [K] bool, ratio outside the clip range, on either side
    low: Tensor  # [K] bool, the gradient vanishes below the range
    high: Tensor  # [K] bool, the gradient vanishes above it


@dataclass(frozen=True, slots=True)
class Corrected:
    """Importance weights of K units from the sampler's old log-probabilities to the trainer's.

    They carry no gradient.
    """

    ratio: Tensor  # [K]
    weights: Tensor  # [K], of the unit's term
    changed: Tensor  # [K] bool, where these differ


def document_sums(
    values: Tensor,  # [..., T]
    inputs: LossInputs,
) -> Tensor:  # [..., D]
    """Add up ``values`` over each document's labelled tokens on all ranks.

    Collective over a context group.
    """
    picked = torch.where(inputs.loss_mask, values, 0.0)  # not a product: -inf * 0 is nan
    num_documents = inputs.label_counts.numel()
    sums = sums_at(picked, inputs.document_index, num_documents)
    return inputs.complete(sums)


def document_means(
    values: Tensor,  # [..., T]
    inputs: LossInputs,
) -> Tensor:  # [..., D]
    """Average ``values`` over each document's labelled tokens; 0 without any. Collective."""
    sums = document_sums(values, inputs)
    return per_label(sums, inputs.label_counts)


def per_label(
    amounts: Tensor,  # [..., D]
    label_counts: Tensor,  # [D]
) -> Tensor:  # [..., D]
    """Divide amounts per document by their label counts (at least 1)."""
    at_least_one = label_counts.clamp(min=1)
    return amounts / at_least_one


def sums_at(
    values: Tensor,  # [..., K]
    index: Tensor,  # [K] int64 in [0, size)
    size: int,
) -> Tensor:  # [..., size]
    """Add up the values that have the same index."""
    leading = values.shape[:-1]
    zeros = values.new_zeros(*leading, size)
    return zeros.index_add(-1, index, values)


def count_once(
    terms: Tensor,  # [K]
    counted: Tensor,  # [K] bool
) -> Tensor:  # []
    """Add up the terms that are counted here, with the gradient of all of them."""
    gradient_alone = terms - terms.detach()
    summands = torch.where(counted, terms, gradient_alone)
    return summands.sum()


def measure_drift(logps: Tensor, inputs: LossInputs) -> Drift:
    """Return what every ratio is made of. A document is valid if its every value is finite.

    One sum over a context group, by segment where there are any, since these add up to documents.
    """
    log_ratio = logps - inputs.old_logps
    finite = _finite_tokens(log_ratio, inputs)
    is_trained = inputs.loss_mask & finite
    is_bad = inputs.loss_mask & ~finite
    advantages, mismatch = _advantages_and_mismatch(log_ratio, inputs)
    trained: list[Tensor] = []
    for values in (log_ratio, logps, advantages, mismatch):
        trained.append(torch.where(is_trained, values, 0.0))
    tokens = torch.stack((*trained, is_bad.to(log_ratio.dtype)))
    segments, documents = _sums(tokens, inputs)

    valid = _valid_documents(documents, inputs)
    token_valid = inputs.loss_mask & valid[inputs.document_index]
    document_rows = torch.where(valid, documents[:4], 0.0)
    return Drift(
        log_ratio=torch.where(token_valid, trained[0], 0.0),
        logps=torch.where(token_valid, trained[1], 0.0),
        mismatch=torch.where(token_valid, trained[3], 0.0),
        documents=DriftTable(document_rows),
        segments=None if segments is None else DriftTable(segments[:4]),
        valid=valid,
        token_valid=token_valid,
    )


def _finite_tokens(log_ratio: Tensor, inputs: LossInputs) -> Tensor:  # [T] bool
    finite = log_ratio.detach().isfinite()
    for logps in (inputs.ref_logps, inputs.sampler_logps):
        if logps is not None:
            finite = finite & logps.isfinite()
    return finite


def _advantages_and_mismatch(
    log_ratio: Tensor, inputs: LossInputs
) -> tuple[Tensor, Tensor]:  # [T], [T]
    """Return the tokens' own advantages and mismatches, zeros where the inputs have none."""
    advantages = inputs.token_advantages
    if advantages is None:
        advantages = torch.zeros_like(log_ratio)
    if inputs.sampler_logps is None:
        return advantages, torch.zeros_like(log_ratio)
    return advantages, inputs.old_logps - inputs.sampler_logps


def _sums(
    tokens: Tensor,  # [N, T]
    inputs: LossInputs,
) -> tuple[Tensor | None, Tensor]:  # [N, K], [N, D]
    """Return the sums over segments, if there are any, and over documents. Collective."""
    if inputs.segments is None:
        return None, document_sums(tokens, inputs)
    owner = inputs.segments.document
    here = sums_at(tokens, inputs.segments.index, owner.numel())
    segments = inputs.complete(here)
    documents = sums_at(segments, owner, inputs.label_counts.numel())
    return segments, documents


def _valid_documents(
    sums: Tensor,  # [5, D], the last row counts tokens that are not finite
    inputs: LossInputs,
) -> Tensor:  # [D] bool
    has_labels = inputs.label_counts > 0
    tokens_are_finite = sums[-1] == 0
    sums_are_finite = sums.isfinite().all(0)  # they may overflow
    is_finite = tokens_are_finite & sums_are_finite
    advantage_is_finite = inputs.advantages.isfinite()
    return has_labels & is_finite & advantage_is_finite


def document_units(drift: Drift, weights: Tensor, inputs: LossInputs) -> Units:
    """Return documents as units of the ratio; ``weights`` [D] are theirs."""
    num_documents = inputs.label_counts.numel()
    numbers = torch.arange(num_documents, device=weights.device)
    documents = Segments(inputs.document_index, numbers, inputs.label_counts)
    return _whole_units(drift.documents, documents, weights, drift, inputs)


def segment_units(drift: Drift, weights: Tensor, inputs: LossInputs, segments: Segments) -> Units:
    """Return segments as units; a document's weight is spread over its segments by their labels."""
    assert drift.segments is not None, "the drift has the sums of the segments that its inputs have"
    return _whole_units(drift.segments, segments, weights, drift, inputs)


def _whole_units(
    sums: DriftTable, segments: Segments, weights: Tensor, drift: Drift, inputs: LossInputs
) -> Units:
    """Return units that every rank of a context group has."""
    counts = segments.label_counts
    document = segments.document
    has_labels = counts > 0
    valid = drift.valid[document] & has_labels
    valid_sums = torch.where(valid, sums.rows, 0.0)
    means = DriftTable(per_label(valid_sums, counts))
    advantages = means.advantages
    if inputs.token_advantages is None:
        advantages = inputs.advantages[document]
    num_tokens = counts.to(weights.dtype)
    share = per_label(num_tokens, inputs.label_counts[document])
    unit_weights = weights[document] * share
    return Units(
        log_ratio=means.log_ratio,
        logps=means.logps,
        mismatch=means.mismatch,
        advantages=advantages,
        weights=torch.where(valid, unit_weights, 0.0),
        valid=valid,
        counted=valid if inputs.counted is None else valid & inputs.counted[document],
        document=document,
        num_tokens=counts,
        complete=whole_here,
    )


def token_units(drift: Drift, weights: Tensor, inputs: LossInputs) -> Units:
    """Return the labelled tokens here as units; a document's weight is spread evenly over them."""
    valid = drift.token_valid
    document = inputs.document_index
    advantages = inputs.token_advantages
    if advantages is None:
        advantages = inputs.advantages[document]
    token_weights = per_label(weights, inputs.label_counts)[document]
    return Units(
        log_ratio=drift.log_ratio,
        logps=drift.logps,
        mismatch=drift.mismatch,
        advantages=torch.where(valid, advantages, 0.0),
        weights=torch.where(valid, token_weights, 0.0),
        valid=valid,
        counted=valid,
        document=document,
        num_tokens=valid.long(),
        complete=inputs.complete,
    )
