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
    flags = torch.stack((units.valid, terms.bounded, result.outside, result.low | result.high))
    hits = _documents_with(flags, units, inputs)
    documents = _DocumentFlags(*hits)
    counts = _DocumentFlags(*hits.sum(-1))
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
    ratio = terms.log_ratio.detach().exp()
    num_units = units.counted.sum()
    counted_ratio = torch.where(units.counted, ratio, 0.0)
    counted_square = torch.where(units.counted, ratio.square(), 0.0)
    return {
        "ratio/mean": Mean(counted_ratio.sum(), num_units),
        "_ratio_sq": Mean(counted_square.sum(), num_units),
        "ratio/max": Max(_largest(ratio, units.valid)),
        "ratio/min": Min(-_largest(-ratio, units.valid)),
    }


def _drift_since_sampling(drift: Drift, num_documents: Tensor, inputs: LossInputs) -> Metrics:
    log_ratio = drift.log_ratio.detach()
    k3_nats = torch.expm1(log_ratio.clamp(-20, 20)) - log_ratio
    means = per_label(drift.documents.log_ratio.detach(), inputs.label_counts)
    num_tokens = inputs.loss_mask.sum()
    return {
        "kl_new_old": Mean(k3_nats.sum(), num_documents),
        "_log_ratio_sq": Mean(log_ratio.square().sum(), num_tokens),
        "log_ratio/abs_document": Mean(_counted(means.abs(), inputs).sum(), num_documents),
    }


def _clipped_units(units: Units, result: SurrogateTerms, inputs: LossInputs) -> Metrics:
    num_units = units.counted.sum()
    num_tokens = inputs.loss_mask.sum()
    binding = result.low | result.high
    tokens_outside = torch.where(result.outside & units.counted, units.num_tokens, 0)
    tokens_binding = torch.where(binding & units.counted, units.num_tokens, 0)
    return {
        "clip/any_token": Mean(tokens_outside.sum(), num_tokens),
        "clip/binding_token": Mean(tokens_binding.sum(), num_tokens),
        "clip/low": Mean((result.low & units.counted).sum(), num_units),
        "clip/high": Mean((result.high & units.counted).sum(), num_units),
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
        metrics[f"clip/binding_document_to_{length}"] = _share(documents.binding, inside)
        remaining = remaining & ~inside
    metrics["clip/binding_document_longer"] = _share(documents.binding, remaining)
    return metrics


def _share(flags: Tensor, among: Tensor) -> Mean:
    """Return the share of those in ``among`` that have a flag."""
    return Mean((flags & among).sum(), among.sum())


def mismatch_metrics(drift: Drift, inputs: LossInputs) -> Metrics:
    """Return what trainer and sampler disagree by at the same weights, in nats."""
    mismatch = drift.mismatch.detach()
    means = per_label(drift.documents.mismatch.detach(), inputs.label_counts)
    num_documents = _counted(drift.valid, inputs).sum()
    return {
        "_mismatch_sq": Mean(mismatch.square().sum(), inputs.loss_mask.sum()),
        "mismatch/abs_document": Mean(_counted(means.abs(), inputs).sum(), num_documents),
    }


def correction_metrics(corrected: Corrected, units: Units) -> Metrics:
    """Return metrics of a correction's ratios before and after they are truncated or masked."""
    num_units = units.counted.sum()

    def mean(values: Tensor) -> Mean:
        return Mean(torch.where(units.counted, values, 0.0).sum(), num_units)

    return {
        "correction/ratio_mean": mean(corrected.ratio),
        "correction/ratio_max": Max(_largest(corrected.ratio, units.valid)),
        "correction/weight_mean": mean(corrected.weights),
        "_correction_ratio_sq": mean(corrected.ratio.square()),
        "_correction_weight_sq": mean(corrected.weights.square()),
        "correction/changed": Mean((corrected.changed & units.counted).sum(), num_units),
    }


def token_metrics(logps: Tensor, entropy: Tensor, inputs: LossInputs) -> Metrics:
    """Return means per labelled token, in nats."""
    num_tokens = inputs.loss_mask.sum()
    values = {"new_logps": logps, "old_logps": inputs.old_logps, "entropy": entropy}
    metrics: Metrics = {}
    for name, value in values.items():
        metrics[name] = Mean(torch.where(inputs.loss_mask, value, 0.0).sum(), num_tokens)
    return metrics


def count_not_finite(
    valid: Tensor,  # [D] bool
    inputs: LossInputs,
) -> NotFinite:
    """Count the documents taken out because a value of theirs is not finite, and their labels."""
    taken_out = _counted((inputs.label_counts > 0) & ~valid, inputs)
    tokens = torch.where(taken_out, inputs.label_counts, 0)
    return NotFinite(taken_out.sum(), tokens.sum())


def quarantine_metrics(not_finite: NotFinite) -> Metrics:
    """Return the number of documents taken out as a metric."""
    return {"quarantined_documents": Sum(not_finite.documents)}


def _documents_with(
    flags: Tensor,  # [N, K] bool
    units: Units,
    inputs: LossInputs,
) -> Tensor:  # [N, D] bool
    """Return which documents counted here have a valid unit with each of N flags."""
    flagged = (flags & units.valid).to(units.weights.dtype)
    hits = sums_at(flagged, units.document, inputs.label_counts.numel())
    return _counted(units.complete(hits) > 0, inputs)


def _counted(values: Tensor, inputs: LossInputs) -> Tensor:  # [..., D]
    """Return a value per document, False or 0 where another rank counts it."""
    if inputs.counted is None:
        return values
    return torch.where(inputs.counted, values, torch.zeros_like(values))


def _largest(
    values: Tensor,  # [K]
    valid: Tensor,  # [K] bool
) -> Tensor:  # []
    """Return the largest valid value, -inf without any: a microbatch without labels."""
    picked = torch.where(valid, values, -torch.inf)
    return torch.cat((picked, picked.new_full((1,), -torch.inf))).max()
