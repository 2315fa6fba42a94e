"""Metric sums of an objective: its ratios, what the clip and a correction do to them, and what was quarantined.

Each is added up where it is counted, so that the sums of all ranks are those of one. :data:`gspo.metrics.METRICS`
declares how they are put together.
"""

from __future__ import annotations

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
from gspo.types import MetricSums

LENGTH_BINS = (64, 256, 1024)  # labelled tokens, upper ends


def ratio_metrics(
    drift: Drift, terms: RatioTerms, result: SurrogateTerms, inputs: LossInputs
) -> MetricSums:
    """Ratios in the objective's own units, what the clip does to them, and how far the policy is from the sampler's.

    ``any`` counts ratios outside the band, ``binding`` only those whose gradient the clip stops.
    """
    units, ratio = terms.units, terms.log_ratio.detach().exp()
    log_ratio = drift.log_ratio.detach()
    means = per_label(drift.documents[0].detach(), inputs.label_counts)
    binding = result.low | result.high
    flags = torch.stack((units.valid, terms.bounded, result.outside, binding))
    with_flags = _documents_with(flags, units, inputs)
    documents, bounded, outside, bound = with_flags.sum(-1)
    num_units, tokens = units.counted.sum(), inputs.loss_mask.sum()
    k3_nats = torch.expm1(log_ratio.clamp(-20, 20)) - log_ratio
    one = ratio.new_ones(())
    return {
        "ratio/mean": (torch.where(units.counted, ratio, 0.0).sum(), num_units),
        "_ratio_sq": (torch.where(units.counted, ratio.square(), 0.0).sum(), num_units),
        "ratio/max": (_largest(torch.where(units.valid, ratio, -torch.inf)), one),
        "ratio/min": (-_largest(torch.where(units.valid, -ratio, -torch.inf)), one),
        "bounded_documents": (bounded, one),
        "kl_new_old": (k3_nats.sum(), documents),
        "_log_ratio_sq": (log_ratio.square().sum(), tokens),
        "log_ratio/abs_document": (_counted(means.abs(), inputs).sum(), documents),
        "clip/any_document": (outside, documents),
        "clip/binding_document": (bound, documents),
        "clip/any_token": (
            torch.where(result.outside & units.counted, units.num_tokens, 0).sum(),
            tokens,
        ),
        "clip/binding_token": (
            torch.where(binding & units.counted, units.num_tokens, 0).sum(),
            tokens,
        ),
        "clip/low": ((result.low & units.counted).sum(), num_units),
        "clip/high": ((result.high & units.counted).sum(), num_units),
    } | _clip_by_length(with_flags[0], with_flags[3], inputs.label_counts)


def _clip_by_length(
    documents: Tensor,  # [D] bool
    bound: Tensor,  # [D] bool, those whose gradient the clip stops, in part at least
    label_counts: Tensor,  # [D]
) -> MetricSums:
    """``clip/binding_document`` by length: a band on a mean clips short documents first, one on a product long ones."""
    found, above = {}, torch.zeros_like(documents)
    for length in (*LENGTH_BINS, None):
        within = documents & ~above & (label_counts <= length if length else ~above)
        name = f"clip/binding_document_{f'to_{length}' if length else 'longer'}"
        found[name] = ((bound & within).sum(), within.sum())
        above = above | within
    return found


def mismatch_metrics(drift: Drift, inputs: LossInputs) -> MetricSums:
    """What trainer and sampler disagree by, in nats, at the weights that the old log-probabilities are of."""
    mismatch = drift.mismatch.detach()
    means = per_label(drift.documents[3].detach(), inputs.label_counts)
    return {
        "_mismatch_sq": (mismatch.square().sum(), inputs.loss_mask.sum()),
        "mismatch/abs_document": (
            _counted(means.abs(), inputs).sum(),
            _counted(drift.valid, inputs).sum(),
        ),
    }


def correction_metrics(corrected: Corrected, units: Units) -> MetricSums:
    """The correction's ratios before and after they are truncated or masked, over the units of the objective."""
    num_units, one = units.counted.sum(), corrected.ratio.new_ones(())

    def total(values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(units.counted, values, 0.0).sum(), num_units

    return {
        "correction/ratio_mean": total(corrected.ratio),
        "correction/ratio_max": (
            _largest(torch.where(units.valid, corrected.ratio, -torch.inf)),
            one,
        ),
        "correction/weight_mean": total(corrected.weights),
        "_correction_ratio_sq": total(corrected.ratio.square()),
        "_correction_weight_sq": total(corrected.weights.square()),
        "correction/changed": ((corrected.changed & units.counted).sum(), num_units),
    }


def token_metrics(logps: Tensor, entropy: Tensor, inputs: LossInputs) -> MetricSums:
    """Means per labelled token, in nats."""
    tokens = inputs.loss_mask.sum()
    values = {"new_logps": logps, "old_logps": inputs.old_logps, "entropy": entropy}
    return {
        name: (torch.where(inputs.loss_mask, v, 0.0).sum(), tokens) for name, v in values.items()
    }


def quarantine_metrics(valid: Tensor, inputs: LossInputs) -> MetricSums:
    """Documents taken out because a value of theirs is not finite, and their labelled tokens."""
    out = _counted((inputs.label_counts > 0) & ~valid, inputs)
    one = valid.new_ones((), dtype=torch.float32)
    tokens = torch.where(out, inputs.label_counts, 0).sum()
    count = out.sum()
    return {
        "quarantined_documents": (count, one),
        "_late_documents": (count, one),
        "_late_tokens": (tokens, one),
    }


def _documents_with(
    flags: Tensor, units: Units, inputs: LossInputs
) -> Tensor:  # [N, K] bool -> [N, D] bool
    """Which documents counted here have a valid unit with each of N flags."""
    hits = sums_at(
        (flags & units.valid).to(units.weights.dtype), units.document, inputs.label_counts.numel()
    )
    return _counted(units.complete(hits) > 0, inputs)


def _counted(values: Tensor, inputs: LossInputs) -> Tensor:  # [..., D]
    """What each document has, False or 0 where another rank counts it."""
    return (
        values
        if inputs.counted is None
        else torch.where(inputs.counted, values, torch.zeros_like(values))
    )


def _largest(values: Tensor) -> Tensor:  # [K] -> [], -inf for K = 0, a microbatch without labels
    return torch.cat((values, values.new_full((1,), -torch.inf))).max()
