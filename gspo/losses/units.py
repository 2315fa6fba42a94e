"""What every objective is made of: its inputs, the drift of the policy, units with one ratio, and sums over documents.

T tokens, D documents, K units of the ratio: tokens, segments or documents. Everything is float32 or float64, whatever
the model's dtype. Where a document spans ranks, its sums are completed here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo.losses.inputs import LossInputs, Segments, whole_here


@dataclass(frozen=True, slots=True)
class Drift:
    """How far each token's log-probability has moved, and the sums of that; 0 where a token is not trained."""

    log_ratio: Tensor  # [T] nats, new - old
    logps: Tensor  # [T] nats
    mismatch: Tensor  # [T] nats, old - sampler's; 0 where these are the same
    documents: Tensor  # [4, D] sums of log_ratio, of logps, of token_advantages (0 where there are none), of mismatch
    segments: Tensor | None  # [4, K] the same
    valid: Tensor  # [D] bool, documents with a label whose every value is finite
    token_valid: Tensor  # [T] bool, their labelled tokens


@dataclass(frozen=True, slots=True)
class Units:
    """What has one ratio: tokens, segments or documents."""

    log_ratio: (
        Tensor  # [K] nats, mean over the unit's labelled tokens; 0 where not valid, as the next
    )
    logps: Tensor  # [K] nats, mean
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
    """A surrogate's loss and where its ratio is outside the band, over K units."""

    loss: Tensor  # [K]
    outside: Tensor  # [K] bool, ratio outside the band, on either side
    low: Tensor  # [K] bool, the gradient vanishes at the low edge
    high: Tensor  # [K] bool, the gradient vanishes at the high edge


@dataclass(frozen=True, slots=True)
class Corrected:
    """Importance weights from the sampler's to the trainer's own old log-probabilities, over K units; no gradient."""

    ratio: Tensor  # [K]
    weights: Tensor  # [K], of the unit's term
    changed: Tensor  # [K] bool, where these differ


def document_sums(
    values: Tensor,  # [..., T]
    inputs: LossInputs,
) -> Tensor:  # [..., D]
    """Sums of ``values`` over each document's labelled tokens, wherever these are. Collective over a context group."""
    picked = torch.where(inputs.loss_mask, values, 0.0)  # not a product: -inf * 0 is nan
    return inputs.complete(sums_at(picked, inputs.document_index, inputs.label_counts.numel()))


def document_means(
    values: Tensor,  # [..., T]
    inputs: LossInputs,
) -> Tensor:  # [..., D]
    """Means of ``values`` over each document's labelled tokens; 0 for one without any. See :func:`document_sums`."""
    return per_label(document_sums(values, inputs), inputs.label_counts)


def per_label(
    amounts: Tensor,  # [..., D]
    label_counts: Tensor,  # [D]
) -> Tensor:  # [..., D]
    """What of an amount falls on each labelled token: sums become means. No token counts as one."""
    return amounts / label_counts.clamp(min=1)


def count_once(
    terms: Tensor,  # [K]
    counted: Tensor,  # [K] bool
) -> Tensor:  # []
    """The sum of ``terms`` that are counted here, with the gradient of all of them."""
    return torch.where(counted, terms, terms - terms.detach()).sum()


def measure_drift(logps: Tensor, inputs: LossInputs) -> Drift:
    """What every ratio is made of. A document is valid if its every value is finite.

    One sum over a context group, by segment where there are any, since these add up to documents.
    """
    found = logps - inputs.old_logps
    finite = found.detach().isfinite()
    for others in (inputs.ref_logps, inputs.sampler_logps):
        if others is not None:
            finite &= others.isfinite()
    trained = inputs.loss_mask & finite
    given = torch.zeros_like(found) if inputs.token_advantages is None else inputs.token_advantages
    mismatch = (
        torch.zeros_like(found)
        if inputs.sampler_logps is None
        else inputs.old_logps - inputs.sampler_logps
    )
    picked = [torch.where(trained, values, 0.0) for values in (found, logps, given, mismatch)]
    rows = torch.stack((*picked, (inputs.loss_mask & ~finite).to(found.dtype)))
    if inputs.segments is None:
        segments, documents = None, document_sums(rows, inputs)
    else:
        index, owner = inputs.segments.index, inputs.segments.document
        segments = inputs.complete(sums_at(rows, index, owner.numel()))
        documents = sums_at(segments, owner, inputs.label_counts.numel())
    *_, num_bad = documents
    valid = (
        (inputs.label_counts > 0)
        & (num_bad == 0)
        & documents.isfinite().all(0)
        & inputs.advantages.isfinite()
    )
    token_valid = inputs.loss_mask & valid[inputs.document_index]
    return Drift(
        log_ratio=torch.where(token_valid, rows[0], 0.0),
        logps=torch.where(token_valid, rows[1], 0.0),
        mismatch=torch.where(token_valid, rows[3], 0.0),
        documents=torch.where(valid, documents[:4], 0.0),
        segments=None if segments is None else segments[:4],
        valid=valid,
        token_valid=token_valid,
    )


def document_units(drift: Drift, weights: Tensor, inputs: LossInputs) -> Units:
    """Documents as units of the ratio; ``weights`` [D] are theirs."""
    own = torch.arange(inputs.label_counts.numel(), device=weights.device)
    return _whole_units(
        drift.documents,
        Segments(inputs.document_index, own, inputs.label_counts),
        weights,
        drift,
        inputs,
    )


def segment_units(drift: Drift, weights: Tensor, inputs: LossInputs, segments: Segments) -> Units:
    """Segments as units; each has the share of its document's weight that it has of the labelled tokens."""
    assert drift.segments is not None, "the drift has the sums of the segments that its inputs have"
    return _whole_units(drift.segments, segments, weights, drift, inputs)


def _whole_units(
    sums: Tensor, parts: Segments, weights: Tensor, drift: Drift, inputs: LossInputs
) -> Units:
    """Units that every rank of a context group has."""
    counts, document = parts.label_counts, parts.document
    valid = drift.valid[document] & (counts > 0)
    log_ratio, logps, advantages, mismatch = per_label(torch.where(valid, sums, 0.0), counts)
    share = per_label(counts.to(weights.dtype), inputs.label_counts[document])
    return Units(
        log_ratio=log_ratio,
        logps=logps,
        mismatch=mismatch,
        advantages=inputs.advantages[document] if inputs.token_advantages is None else advantages,
        weights=torch.where(valid, weights[document] * share, 0.0),
        valid=valid,
        counted=valid if inputs.counted is None else valid & inputs.counted[document],
        document=document,
        num_tokens=counts,
        complete=whole_here,
    )


def token_units(drift: Drift, weights: Tensor, inputs: LossInputs) -> Units:
    """Labelled tokens as units, those that are here; a document's weight is spread evenly over its own."""
    valid, document = drift.token_valid, inputs.document_index
    given = (
        inputs.advantages[document] if inputs.token_advantages is None else inputs.token_advantages
    )
    per_token = per_label(weights, inputs.label_counts)
    return Units(
        log_ratio=drift.log_ratio,
        logps=drift.logps,
        mismatch=drift.mismatch,
        advantages=torch.where(valid, given, 0.0),
        weights=torch.where(valid, per_token[document], 0.0),
        valid=valid,
        counted=valid,
        document=document,
        num_tokens=valid.long(),
        complete=inputs.complete,
    )


def sums_at(
    values: Tensor, index: Tensor, size: int
) -> Tensor:  # [..., K], [K] in [0, size) -> [..., size]
    """Sums of the values that have the same index."""
    return values.new_zeros(*values.shape[:-1], size).index_add(-1, index, values)
