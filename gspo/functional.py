"""Policy objectives as pure functions of ``[T]`` and ``[D]`` tensors.

An objective is three choices, composed: the level of the importance ratio (token, document), the surrogate, and the
aggregation (what one document weighs). Each function here makes one of them; :func:`policy_objective` puts them
together and returns undivided sums, so that the caller divides by the counts of the whole optimizer step.

Not here: the logits (see :mod:`gspo.kernels`), the denominators over ranks, and any reduction over processes.

T tokens, D documents, K units of the ratio (K is T or D). Everything is float32 or float64, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gspo.errors import InputError

MetricSums = dict[str, tuple[Tensor, Tensor]]  # name -> (value sum, weight sum), see gspo.metrics

AGGREGATIONS = ("document", "token", "token_over_documents", "constant")
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True, slots=True)
class LossInputs:
    """What an objective needs beside the new log-probabilities. Whole documents; ``label_counts`` 0 marks padding."""

    document_index: Tensor  # [T] int64 in [0, D)
    loss_mask: Tensor  # [T] bool, True = trained
    old_logps: Tensor  # [T] nats
    advantages: Tensor  # [D]
    label_counts: Tensor  # [D] int64
    ref_logps: Tensor | None = None  # [T] nats


@dataclass(frozen=True, slots=True)
class RatioTerms:
    """The importance ratio at one level, over K units: documents or tokens."""

    log_ratio: Tensor  # [K] nats, bounded; 0 where not valid
    bounded: Tensor  # [K] bool, True where the bound changed it
    advantages: Tensor  # [K]
    weights: Tensor  # [K], the unit's share in the undivided sum; 0 where not valid
    valid: Tensor  # [K] bool
    document: Tensor  # [K] int64, the unit's document
    num_tokens: Tensor  # [K] int64, labelled tokens whose gradient the unit carries


@dataclass(frozen=True, slots=True)
class SurrogateTerms:
    """A surrogate's loss and where its ratio is outside the band, over K units."""

    loss: Tensor  # [K]
    outside: Tensor  # [K] bool, ratio outside the band, on either side
    low: Tensor  # [K] bool, the gradient vanishes at the low edge
    high: Tensor  # [K] bool, the gradient vanishes at the high edge


RatioLevel = Callable[[Tensor, Tensor, Tensor, LossInputs], RatioTerms]
Surrogate = Callable[[Tensor, Tensor], SurrogateTerms]


def document_sum(
    values: Tensor,  # [T]
    document_index: Tensor,  # [T] int64 in [0, D)
    loss_mask: Tensor,  # [T] bool
    num_documents: int,
) -> Tensor:  # [D]
    """Sum of ``values`` over each document's labelled tokens."""
    picked = torch.where(loss_mask, values, 0.0)  # not a product: -inf * 0 is nan
    return picked.new_zeros(num_documents).index_add(0, document_index, picked)


def document_mean(
    values: Tensor,  # [T]
    document_index: Tensor,  # [T] int64 in [0, D)
    loss_mask: Tensor,  # [T] bool
    label_counts: Tensor,  # [D]
) -> Tensor:  # [D]
    """Mean of ``values`` over each document's labelled tokens; 0 for a document without any."""
    totals = document_sum(values, document_index, loss_mask, label_counts.numel())
    return totals / label_counts.clamp(min=1)


def document_weights(label_counts: Tensor, *, aggregation: str, dtype: torch.dtype) -> Tensor:  # [D] -> [D]
    """What each document weighs in the undivided sum: 1 for ``document``, its labelled tokens for the others."""
    return (label_counts > 0 if aggregation == "document" else label_counts).to(dtype)


def loss_denominator(
    num_documents: int, num_label_tokens: int, *, aggregation: str, constant_length: int | None = None
) -> float:
    """The count that the sum is divided by, from the totals of the optimizer step over all ranks and microbatches."""
    if aggregation == "token":
        return float(num_label_tokens)
    if aggregation == "constant":
        if constant_length is None:
            raise InputError(
                "loss.constant_length is not set: aggregation 'constant' divides by documents x this length."
            )
        return float(num_documents * constant_length)
    return float(num_documents)


def document_ratio(
    log_ratio: Tensor,  # [T] new - old log-probability, finite where used
    weights: Tensor,  # [D] of document_weights
    valid: Tensor,  # [D] bool
    inputs: LossInputs,
    *,
    bound: float = 10.0,
) -> RatioTerms:
    """Length-normalised sequence ratio, ``s = exp(mean of log r_t)`` (GSPO, arXiv 2507.18071, eq. 7)."""
    mean = document_mean(log_ratio, inputs.document_index, inputs.loss_mask, inputs.label_counts)
    return RatioTerms(
        log_ratio=mean.clamp(-bound, bound),
        bounded=mean.abs() > bound,
        advantages=inputs.advantages,
        weights=torch.where(valid, weights, 0.0),
        valid=valid,
        document=torch.arange(valid.numel(), device=valid.device),
        num_tokens=inputs.label_counts,
    )


def token_ratio(
    log_ratio: Tensor,  # [T]
    weights: Tensor,  # [D]
    valid: Tensor,  # [D] bool
    inputs: LossInputs,
    *,
    bound: float = 10.0,
) -> RatioTerms:
    """Per-token ratio ``r_t``; a document's weight is spread evenly over its tokens (GRPO, arXiv 2402.03300, eq. 3)."""
    per_token = weights / inputs.label_counts.clamp(min=1)
    token_valid = inputs.loss_mask & valid[inputs.document_index]
    return RatioTerms(
        log_ratio=log_ratio.clamp(-bound, bound),
        bounded=log_ratio.abs() > bound,
        advantages=inputs.advantages[inputs.document_index],
        weights=torch.where(token_valid, per_token[inputs.document_index], 0.0),
        valid=token_valid,
        document=inputs.document_index,
        num_tokens=token_valid.long(),
    )


def clipped_surrogate(
    log_ratio: Tensor,  # [K]
    advantages: Tensor,  # [K]
    *,
    clip_low: float,
    clip_high: float,
) -> SurrogateTerms:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)`` (PPO, arXiv 1707.06347, eq. 7)."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    below, above = ratio < 1 - clip_low, ratio > 1 + clip_high
    return SurrogateTerms(
        loss=-torch.minimum(ratio * advantages, clipped * advantages),
        outside=below | above,
        low=below & (advantages < 0),
        high=above & (advantages > 0),
    )


def kl_estimate(new_logps: Tensor, ref_logps: Tensor, *, estimator: str) -> Tensor:  # [T], [T] -> [T]
    """Per-token estimate of KL(new || ref) from samples of the new policy (Schulman, "Approximating KL divergence")."""
    delta = new_logps - ref_logps
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return 0.5 * delta.square()
    return torch.expm1(-delta) + delta


def policy_objective(
    logps: Tensor,  # [T] nats, under the policy being trained, at the sampling temperature
    entropy: Tensor,  # [T] nats, of the same distribution
    inputs: LossInputs,
    *,
    ratio: RatioLevel,
    surrogate: Surrogate,
    aggregation: str,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
) -> tuple[Tensor, MetricSums]:
    """The undivided loss sum of whole documents and its metric sums.

    A document whose log-ratio is not finite is quarantined: it counts in ``quarantined_documents``
    (and ``_late_documents`` and ``_late_tokens``, which mend the denominators) and nowhere else.
    """
    valid, token_valid = _valid(logps, inputs)
    log_ratio = torch.where(token_valid, logps - inputs.old_logps, 0.0)
    usable = replace(inputs, loss_mask=token_valid, advantages=torch.where(valid, inputs.advantages, 0.0))
    weights = document_weights(inputs.label_counts, aggregation=aggregation, dtype=logps.dtype)
    terms = ratio(log_ratio, weights, valid, usable)
    result = surrogate(terms.log_ratio, terms.advantages)
    loss = (terms.weights * result.loss).sum()
    metrics = (
        _ratio_metrics(log_ratio.detach(), terms, usable)
        | _clip_metrics(terms, result, usable)
        | _token_metrics(logps.detach(), entropy.detach(), usable)
        | _quarantine_metrics(valid, inputs)
    )

    per_token = torch.where(valid, weights / inputs.label_counts.clamp(min=1), 0.0)[inputs.document_index]
    if inputs.ref_logps is not None:
        kl = kl_estimate(torch.where(token_valid, logps, inputs.ref_logps), inputs.ref_logps, estimator=kl_estimator)
        kl = torch.where(token_valid, kl, 0.0)
        metrics["kl_ref"] = (kl.detach().sum(), token_valid.sum())
        loss = loss + kl_coef * (per_token * kl).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (per_token * torch.where(token_valid, entropy, 0.0)).sum()
    return loss, metrics


def _valid(logps: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor]:  # [D] bool, [T] bool
    """Documents, and their labelled tokens, whose every value is finite."""
    # A sum is finite only if every term is; opposite infinities give nan.
    totals = logps.detach() - inputs.old_logps
    if inputs.ref_logps is not None:
        totals = totals + inputs.ref_logps
    totals = document_sum(totals, inputs.document_index, inputs.loss_mask, inputs.label_counts.numel())
    valid = (inputs.label_counts > 0) & totals.isfinite() & inputs.advantages.isfinite()
    return valid, inputs.loss_mask & valid[inputs.document_index]


def _documents_with(flag: Tensor, terms: RatioTerms, num_documents: int) -> Tensor:  # [K] bool -> []
    """How many documents hold a flagged unit."""
    hits = terms.document.new_zeros(num_documents).index_add(0, terms.document, (flag & terms.valid).long())
    return (hits > 0).sum()


def _ratio_metrics(log_ratio: Tensor, terms: RatioTerms, inputs: LossInputs) -> MetricSums:
    """Ratios in the objective's own units, and how far the policy is from the one that sampled."""
    ratio = terms.log_ratio.detach().exp()
    units, tokens = terms.valid.sum(), inputs.loss_mask.sum()
    documents = _documents_with(terms.valid, terms, inputs.label_counts.numel())
    means = document_mean(log_ratio, inputs.document_index, inputs.loss_mask, inputs.label_counts)
    k3 = torch.expm1(log_ratio.clamp(-20, 20)) - log_ratio
    one = ratio.new_ones(())
    return {
        "ratio/mean": (torch.where(terms.valid, ratio, 0.0).sum(), units),
        "_ratio_sq": (torch.where(terms.valid, ratio.square(), 0.0).sum(), units),
        "ratio/max": (_largest(torch.where(terms.valid, ratio, -torch.inf)), one),
        "ratio/min": (-_largest(torch.where(terms.valid, -ratio, -torch.inf)), one),
        "bounded_documents": (_documents_with(terms.bounded, terms, inputs.label_counts.numel()), one),
        "kl_new_old": (k3.sum(), documents),
        "_log_ratio_sq": (log_ratio.square().sum(), tokens),
        "log_ratio/abs_document": (means.abs().sum(), documents),
    }


def _largest(values: Tensor) -> Tensor:  # [K] -> [], -inf for K = 0, a microbatch without labels
    return torch.cat((values, values.new_full((1,), -torch.inf))).max()


def _clip_metrics(terms: RatioTerms, result: SurrogateTerms, inputs: LossInputs) -> MetricSums:
    """``any`` counts ratios outside the band, ``binding`` only those whose gradient the clip stops."""
    num_documents = inputs.label_counts.numel()
    documents = _documents_with(terms.valid, terms, num_documents)
    units = terms.valid.sum()
    binding = (result.low | result.high) & terms.valid
    return {
        "clip/any_document": (_documents_with(result.outside, terms, num_documents), documents),
        "clip/binding_document": (_documents_with(binding, terms, num_documents), documents),
        "clip/binding_token": (torch.where(binding, terms.num_tokens, 0).sum(), inputs.loss_mask.sum()),
        "clip/low": ((result.low & terms.valid).sum(), units),
        "clip/high": ((result.high & terms.valid).sum(), units),
    }


def _token_metrics(logps: Tensor, entropy: Tensor, inputs: LossInputs) -> MetricSums:
    """Means per labelled token, in nats."""
    tokens = inputs.loss_mask.sum()
    values = {"new_logps": logps, "old_logps": inputs.old_logps, "entropy": entropy}
    return {name: (torch.where(inputs.loss_mask, v, 0.0).sum(), tokens) for name, v in values.items()}


def _quarantine_metrics(valid: Tensor, inputs: LossInputs) -> MetricSums:
    """Documents taken out because a value of theirs is not finite, and their labelled tokens."""
    out = (inputs.label_counts > 0) & ~valid
    one = valid.new_ones((), dtype=torch.float32)
    tokens = torch.where(out, inputs.label_counts, 0).sum()
    count = out.sum()
    return {"quarantined_documents": (count, one), "_late_documents": (count, one), "_late_tokens": (tokens, one)}
