"""Metrics of an objective: its ratios, what clip and correction do to them, what was quarantined.

Each is added up where it is counted, so that the sums of all ranks are those of one.
:data:`gspo.metrics.METRICS` describes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gspo.losses.inputs import LossInputs
from gspo.losses.units import (
    Corrected,
    Drift,
    RatioTerms,
    SurrogateTerms,
    Units,
    per_label,
    sums_at,
)
from gspo.metrics import Max, Mean, Metrics, Min, NotFinite, Sum

LENGTH_BINS = (64, 256, 1024)  # labelled tokens, upper ends


@dataclass(frozen=True, slots=True)
class _DocumentFlags:
    """A document is counted here and has a valid unit that is so: [D] bool, or [] their number."""

    valid: Tensor  # has a valid unit
    bounded: Tensor
    outside: Tensor  # the clip range
    binding: Tensor  # the clip stops a gradient


def ratio_metrics(
    drift: Drift, terms: RatioTerms, result: SurrogateTerms, inputs: LossInputs
) -> Metrics:
    """Return metrics of the ratios in the objective's units, of the clip and of the drift.

    ``any`` counts ratios outside the clip range, ``binding`` only those whose gradient the clip
    stops. Collective over a context group where units are tokens.
    """
    units = terms.units
    binding = result.low | result.high
    flags = torch.stack((units.valid, terms.bounded, result.outside, binding))
    hits = _documents_with(flags, units, inputs)  # [4, D]
    num_hits = hits.sum(-1)
    documents = _DocumentFlags(*hits)
    counts = _DocumentFlags(*num_hits)
    return {
        **_ratios(terms),
        "bounded_documents": Sum(counts.bounded),
        **_drift_since_sampling(drift, counts.valid, inputs),
        "clip/any_document": Mean(counts.outside, counts.valid),
        "clip/binding_document": Mean(counts.binding, counts.valid),
        **_clipped_units(units, result, inputs),
        **_clip_by_length(documents, inputs.label_counts),
    }


def _ratios(terms: RatioTerms) -> Metrics:
    units = terms.units
    log_ratio = terms.log_ratio.detach()
    ratio = log_ratio.exp()
    smallest = -_largest(-ratio, units.valid)
    num_units = units.counted.sum()
    sum_of_ratios = _sum_where(units.counted, ratio)
    sum_of_squares = _sum_where(units.counted, ratio.square())
    return {
        "ratio/mean": Mean(sum_of_ratios, num_units),
        "_ratio_sq": Mean(sum_of_squares, num_units),
        "ratio/max": Max(_largest(ratio, units.valid)),
        "ratio/min": Min(smallest),
    }


def _drift_since_sampling(drift: Drift, num_documents: Tensor, inputs: LossInputs) -> Metrics:
    log_ratio = drift.log_ratio.detach()
    bounded = log_ratio.clamp(-20, 20)
    k3_nats = torch.expm1(bounded) - log_ratio
    sum_of_squares = log_ratio.square().sum()
    num_tokens = inputs.loss_mask.sum()
    sums = drift.documents.log_ratio.detach()
    sum_of_means = _sum_of_absolute_means(sums, inputs)
    return {
        "kl_new_old": Mean(k3_nats.sum(), num_documents),
        "_log_ratio_sq": Mean(sum_of_squares, num_tokens),
        "log_ratio/abs_document": Mean(sum_of_means, num_documents),
    }


def _sum_of_absolute_means(
    sums: Tensor,  # [D] over labelled tokens
    inputs: LossInputs,
) -> Tensor:  # []
    means = per_label(sums, inputs.label_counts)
    absolutes = means.abs()
    counted = _counted(absolutes, inputs)
    return counted.sum()


def _clipped_units(units: Units, result: SurrogateTerms, inputs: LossInputs) -> Metrics:
    num_tokens = inputs.loss_mask.sum()
    outside = result.outside & units.counted
    low = result.low & units.counted
    high = result.high & units.counted
    num_outside = _sum_where(outside, units.num_tokens)
    num_binding = _sum_where(low | high, units.num_tokens)
    return {
        "clip/any_token": Mean(num_outside, num_tokens),
        "clip/binding_token": Mean(num_binding, num_tokens),
        "clip/low": _share(low, units.counted),
        "clip/high": _share(high, units.counted),
    }


def _clip_by_length(
    documents: _DocumentFlags,
    label_counts: Tensor,  # [D]
) -> Metrics:
    """Return ``clip/binding_document`` by length.

    A clip range on a mean clips short documents first, one on a product long ones.
    """
    metrics: Metrics = {}
    remaining = documents.valid
    for length in LENGTH_BINS:
        inside = remaining & (label_counts <= length)
        name = f"clip/binding_document_to_{length}"
        metrics[name] = _share(documents.binding, inside)
        remaining = remaining & ~inside
    metrics["clip/binding_document_longer"] = _share(documents.binding, remaining)
    return metrics


def _share(flags: Tensor, among: Tensor) -> Mean:
    """Return the share of those in ``among`` that have a flag."""
    flagged = flags & among
    num_flagged = flagged.sum()
    return Mean(num_flagged, among.sum())


def mismatch_metrics(drift: Drift, inputs: LossInputs) -> Metrics:
    """Return what trainer and sampler disagree by at the same weights, in nats."""
    mismatch = drift.mismatch.detach()
    squares = mismatch.square()
    num_tokens = inputs.loss_mask.sum()
    sums = drift.documents.mismatch.detach()
    sum_of_means = _sum_of_absolute_means(sums, inputs)
    documents = _counted(drift.valid, inputs)
    return {
        "_mismatch_sq": Mean(squares.sum(), num_tokens),
        "mismatch/abs_document": Mean(sum_of_means, documents.sum()),
    }


def correction_metrics(corrected: Corrected, units: Units) -> Metrics:
    """Return metrics of a correction's ratios before and after they are truncated or masked."""
    num_units = units.counted.sum()

    def mean(values: Tensor) -> Mean:
        total = _sum_where(units.counted, values)
        return Mean(total, num_units)

    largest = _largest(corrected.ratio, units.valid)
    return {
        "correction/ratio_mean": mean(corrected.ratio),
        "correction/ratio_max": Max(largest),
        "correction/weight_mean": mean(corrected.weights),
        "_correction_ratio_sq": mean(corrected.ratio.square()),
        "_correction_weight_sq": mean(corrected.weights.square()),
        "correction/changed": _share(corrected.changed, units.counted),
    }


def token_metrics(logps: Tensor, entropy: Tensor, inputs: LossInputs) -> Metrics:
    """Return means per labelled token, in nats."""
    num_tokens = inputs.loss_mask.sum()

    def mean(values: Tensor) -> Mean:
        total = _sum_where(inputs.loss_mask, values)
        return Mean(total, num_tokens)

    return {
        "new_logps": mean(logps),
        "old_logps": mean(inputs.old_logps),
        "entropy": mean(entropy),
    }


def kl_metrics(
    divergence: Tensor,  # [T] nats, 0 where not valid
    drift: Drift,
) -> Metrics:
    """Return the KL to the reference policy per labelled token."""
    total = divergence.sum()
    num_tokens = drift.token_valid.sum()
    return {"kl_ref": Mean(total, num_tokens)}


def count_not_finite(
    valid: Tensor,  # [D] bool
    inputs: LossInputs,
) -> NotFinite:
    """Count the documents taken out because a value of theirs is not finite, and their labels."""
    has_labels = inputs.label_counts > 0
    is_taken_out = has_labels & ~valid
    taken_out = _counted(is_taken_out, inputs)
    num_documents = taken_out.sum()
    num_tokens = _sum_where(taken_out, inputs.label_counts)
    return NotFinite(num_documents, num_tokens)


def quarantine_metrics(not_finite: NotFinite) -> Metrics:
    """Return the number of documents taken out as a metric."""
    return {"quarantined_documents": Sum(not_finite.documents)}


def _sum_where(flags: Tensor, values: Tensor) -> Tensor:  # []
    """Add up the values that have a flag; no product, since 0 * inf is nan."""
    picked = torch.where(flags, values, 0)
    return picked.sum()


def _documents_with(
    flags: Tensor,  # [N, K] bool
    units: Units,
    inputs: LossInputs,
) -> Tensor:  # [N, D] bool
    """Return which documents counted here have a valid unit with each of N flags."""
    flagged = flags & units.valid
    amounts = flagged.to(units.weights.dtype)
    num_documents = inputs.label_counts.numel()
    hits_here = sums_at(amounts, units.document, num_documents)
    hits = units.complete(hits_here)
    is_hit = hits > 0
    return _counted(is_hit, inputs)


def _counted(values: Tensor, inputs: LossInputs) -> Tensor:  # [..., D]
    """Return a value per document, False or 0 where another rank counts it."""
    if inputs.counted is None:
        return values
    zeros = torch.zeros_like(values)
    return torch.where(inputs.counted, values, zeros)


def _largest(
    values: Tensor,  # [K]
    valid: Tensor,  # [K] bool
) -> Tensor:  # []
    """Return the largest valid value, -inf without any: a microbatch without labels."""
    lowest = -torch.inf
    picked = torch.where(valid, values, lowest)
    none = picked.new_full((1,), lowest)
    at_least_one = torch.cat((picked, none))
    return at_least_one.max()
