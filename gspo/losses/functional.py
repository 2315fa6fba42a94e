"""Policy objectives as pure functions of ``[T]`` and ``[D]`` tensors.

An objective is three choices, composed: the level of the importance ratio (token, document, segment, and mixes), the
surrogate, and the aggregation (what one document weighs). Each function here makes one of them;
:func:`policy_objective` puts them together and returns undivided sums, so that the caller divides by the counts of the
whole optimizer step.

Not here: the logits (see :mod:`gspo.kernels`), the denominators over ranks, and any reduction over processes.

T tokens, D documents, K units of the ratio: tokens, segments or documents. Everything is float32 or float64, whatever
the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gspo.errors import InputError
from gspo.losses.accounting import (
    correction_metrics,
    mismatch_metrics,
    quarantine_metrics,
    ratio_metrics,
    token_metrics,
)
from gspo.losses.inputs import LossInputs
from gspo.losses.units import (
    Corrected,
    Drift,
    RatioTerms,
    SurrogateTerms,
    Units,
    count_once,
    document_units,
    measure_drift,
    per_label,
    segment_units,
    token_units,
)
from gspo.types import MetricSums

RatioLevel = Callable[
    [Drift, Tensor, LossInputs], RatioTerms
]  # of a drift, document weights [D] and the inputs


Surrogate = Callable[[RatioTerms], SurrogateTerms]


Correction = Callable[[Units, Drift, LossInputs], Corrected]


DocumentWeights = Callable[[Tensor], Tensor]  # [D] labelled tokens -> [D]


KLEstimator = Callable[[Tensor, Tensor], Tensor]  # [T] new and reference log-probabilities -> [T]


def equal_weights(label_counts: Tensor) -> Tensor:  # [D] -> [D]
    """Every document that has a label weighs 1."""
    return label_counts > 0


def token_weights(label_counts: Tensor) -> Tensor:  # [D] -> [D]
    """A document weighs its labelled tokens."""
    return label_counts


def over_documents(num_documents: int, num_label_tokens: int) -> float:
    """Divide by the documents of the optimizer step, over all ranks and microbatches, as all of these do."""
    return float(num_documents)


def over_tokens(num_documents: int, num_label_tokens: int) -> float:
    """Divide by the labelled tokens."""
    return float(num_label_tokens)


def over_constant_length(
    num_documents: int, num_label_tokens: int, *, constant_length: int
) -> float:
    """Divide by the documents times a fixed number of tokens (Dr. GRPO, arXiv 2503.20783, appendix)."""
    return float(num_documents * constant_length)


def over_batch_size(num_documents: int, num_label_tokens: int, *, batch_size: int) -> float:
    """Divide by a fixed number, however many documents the step has."""
    return float(batch_size)


AGGREGATIONS: dict[
    str, tuple[DocumentWeights, Callable[..., float]]
] = {  # what a document weighs, and over what
    "document": (equal_weights, over_documents),
    "token": (token_weights, over_tokens),
    "token_over_documents": (token_weights, over_documents),
    "constant": (token_weights, over_constant_length),
    "token_over_batch_size": (token_weights, over_batch_size),
}


def document_ratio(
    drift: Drift,
    weights: Tensor,  # [D]
    inputs: LossInputs,
    *,
    bound: float = 10.0,
    length_exponent: float = 1.0,
) -> RatioTerms:
    """Sequence ratio ``exp(sum of l_t / N^g)``; ``s``, its geometric mean, at g = 1 (GSPO, arXiv 2507.18071, eq. 7)."""
    units = document_units(drift, weights, inputs)
    scale = units.num_tokens.clamp(min=1).to(units.log_ratio.dtype) ** (1 - length_exponent)
    return _bounded(units, units.log_ratio * scale, -bound, bound)


def segment_ratio(
    drift: Drift,
    weights: Tensor,  # [D]
    inputs: LossInputs,
    *,
    bound: float = 10.0,
) -> RatioTerms:
    """GSPO's ratio of each segment; a document's weight is spread over its segments by their labelled tokens.

    At a ratio of 1 the gradient is GSPO's, whatever the segments. One per document is GSPO, one per token is GRPO.

    Raises:
        InputError: there are no segments.
    """
    if inputs.segments is None:
        raise InputError(
            "loss._component_ names an objective with a ratio per segment, but the documents have none: let the run "
            "cut them, e.g. with segments._component_=gspo.data.segments.AtDelimiter (a batch of your own needs a "
            "segment_index), or name gspo.losses.GSPOLoss."
        )
    units = segment_units(drift, weights, inputs, inputs.segments)
    return _bounded(units, units.log_ratio, -bound, bound)


def token_ratio(
    drift: Drift,
    weights: Tensor,  # [D]
    inputs: LossInputs,
    *,
    bound: float = 10.0,
) -> RatioTerms:
    """Per-token ratio ``r_t``; a document's weight is spread evenly over its tokens (GRPO, arXiv 2402.03300, eq. 3)."""
    units = token_units(drift, weights, inputs)
    return _bounded(units, units.log_ratio, -bound, bound)


def document_ratio_per_token(
    drift: Drift,
    weights: Tensor,  # [D]
    inputs: LossInputs,
    *,
    bound: float = 10.0,
    bound_below: bool = True,
) -> RatioTerms:
    """Value ``s``, gradient through ``logp_t`` alone (GSPO-token, arXiv 2507.18071, eq. 14); weights as in GRPO.

    So that tokens of a document may have different advantages. ``bound_below`` False bounds large ratios only, as verl.
    """
    units = token_units(drift, weights, inputs)
    return _bounded(
        units, _sequence_exponent(units, drift, inputs), -bound if bound_below else -math.inf, bound
    )


def mixed_ratio(
    drift: Drift,
    weights: Tensor,  # [D]
    inputs: LossInputs,
    *,
    token_share: float,
    bound: float = 10.0,
) -> RatioTerms:
    """Value ``exp(a l_t + (1 - a) mean l)``, gradient through ``logp_t`` alone, as at both ends.

    ``token_share`` a = 1 is GRPO's ratio, 0 GSPO-token's. The mean is held still: with a gradient of its own, a token's
    credit would again be spread over its document.
    """
    units = token_units(drift, weights, inputs)
    exponent = token_share * units.log_ratio + (1 - token_share) * _sequence_exponent(
        units, drift, inputs
    )
    return _bounded(units, exponent, -bound, bound)


def token_truncated(
    units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float
) -> Corrected:
    """``min(r_t, high)`` for each token (truncated importance sampling; Ionides 2008, doi 10.1198/106186008X320456).

    Each unit has the ratio of its mean, so units must be tokens.
    """
    return _truncated(_exp(units.mismatch), high)


def token_masked(
    units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float
) -> Corrected:
    """``r_t``, and 0 outside [low, high] (as IcePop does); units must be tokens."""
    ratio = _exp(units.mismatch)
    outside = (ratio < low) | (ratio > high)
    return Corrected(ratio, torch.where(outside, 0.0, ratio), outside)


def sequence_product(
    units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float
) -> Corrected:
    """``min(product of r_t, high)`` of the unit's document: unbiased but for the bound, and wide for long ones."""
    return _truncated(_exp(drift.documents[3][units.document]), high)


def sequence_geometric(
    units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float
) -> Corrected:
    """``min(geometric mean of r_t, high)`` of the unit's document: GSPO's ratio, of the mismatch."""
    means = per_label(drift.documents[3], inputs.label_counts)
    return _truncated(_exp(means[units.document]), high)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.detach().clamp(-20.0, 20.0).exp()


def _truncated(ratio: Tensor, high: float) -> Corrected:
    return Corrected(ratio, ratio.clamp(max=high), ratio > high)


CORRECTIONS: dict[str, Callable[..., Corrected]] = {
    "token_tis": token_truncated,
    "token_mask": token_masked,
    "sequence_product": sequence_product,
    "sequence_geometric": sequence_geometric,
}


def unclipped_surrogate(terms: RatioTerms) -> SurrogateTerms:
    """``-r A``: importance sampling, with nothing clipped."""
    nowhere = torch.zeros_like(terms.bounded)
    return SurrogateTerms(
        -terms.log_ratio.exp() * terms.units.advantages, nowhere, nowhere, nowhere
    )


def clipped_surrogate(terms: RatioTerms, *, clip_low: float, clip_high: float) -> SurrogateTerms:
    """``-min(r A, clip(r, 1 - low, 1 + high) A)`` (PPO, arXiv 1707.06347, eq. 7); an infinite width does not clip."""
    ratio, advantages = terms.log_ratio.exp(), terms.units.advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    below, above = ratio < 1 - clip_low, ratio > 1 + clip_high
    return SurrogateTerms(
        loss=-torch.minimum(ratio * advantages, clipped * advantages),
        outside=below | above,
        low=below & (advantages < 0),
        high=above & (advantages > 0),
    )


def dual_clipped_surrogate(
    terms: RatioTerms, *, clip_low: float, clip_high: float, dual_clip: float
) -> SurrogateTerms:
    """The clipped surrogate, and for A < 0 at most ``-c A``, c > 1 (arXiv 1912.09729, eq. 5)."""
    found, advantages = (
        clipped_surrogate(terms, clip_low=clip_low, clip_high=clip_high),
        terms.units.advantages,
    )
    capped = (terms.log_ratio > math.log(dual_clip)) & (advantages < 0)
    loss = torch.where(capped, -dual_clip * advantages, found.loss)
    return SurrogateTerms(loss, found.outside | capped, found.low, found.high | capped)


def cispo_surrogate(terms: RatioTerms, *, clip_low: float, clip_high: float) -> SurrogateTerms:
    """``-sg(clip(r, 1 - low, 1 + high)) A logp`` (CISPO, arXiv 2506.13585, eq. 4 and 5): no gradient vanishes."""
    ratio = terms.log_ratio.detach().exp()
    truncated = ratio.clamp(1 - clip_low, 1 + clip_high)
    nowhere = torch.zeros_like(terms.bounded)
    return SurrogateTerms(
        -truncated * terms.units.advantages * terms.units.logps,
        ratio != truncated,
        nowhere,
        nowhere,
    )


def length_fair_surrogate(
    terms: RatioTerms, *, clip_low: float, clip_high: float
) -> SurrogateTerms:
    """The clipped surrogate with a band of ``-low sqrt(N)`` to ``high sqrt(N)`` on the log (FSPO, arXiv 2509.09177).

    For the product ratio, whose log spreads as sqrt(N): documents of all lengths are then clipped alike.
    """
    advantages = terms.units.advantages
    root = terms.units.num_tokens.clamp(min=1).to(terms.log_ratio.dtype).sqrt()
    below, above = terms.log_ratio < -clip_low * root, terms.log_ratio > clip_high * root
    clipped = torch.minimum(torch.maximum(terms.log_ratio, -clip_low * root), clip_high * root)
    return SurrogateTerms(
        loss=-torch.minimum(terms.log_ratio.exp() * advantages, clipped.exp() * advantages),
        outside=below | above,
        low=below & (advantages < 0),
        high=above & (advantages > 0),
    )


def k1(new_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """``log(new / ref)``, unbiased. All three are per token, in nats (Schulman, "Approximating KL divergence")."""
    return new_logps - ref_logps


def k2(new_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """``log(new / ref)^2 / 2``, biased, whose gradient is the KL's."""
    return 0.5 * (new_logps - ref_logps).square()


def k3(new_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """``ref / new - 1 - log(ref / new)``, unbiased and never negative."""
    delta = new_logps - ref_logps
    return torch.expm1(-delta) + delta


KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": k1, "k2": k2, "k3": k3}


def policy_objective(
    logps: Tensor,  # [T] nats, under the policy being trained, at the sampling temperature
    entropy: Tensor,  # [T] nats, of the same distribution
    inputs: LossInputs,
    *,
    ratio: RatioLevel,
    surrogate: Surrogate,
    weights: DocumentWeights,
    kl_coef: float = 0.0,
    kl: KLEstimator = k3,
    entropy_coef: float = 0.0,
    correction: Correction | None = None,
) -> tuple[Tensor, MetricSums]:
    """The undivided loss sum and its metric sums. Collective where documents span ranks, see :class:`LossInputs`.

    A document whose log-ratio is not finite is quarantined: it counts in ``quarantined_documents``
    (and ``_late_documents`` and ``_late_tokens``, which mend the denominators) and nowhere else.
    """
    drift = measure_drift(logps, inputs)
    valid, token_valid = drift.valid, drift.token_valid
    usable = replace(
        inputs, loss_mask=token_valid, advantages=torch.where(valid, inputs.advantages, 0.0)
    )
    of_documents = torch.where(valid, weights(inputs.label_counts), 0).to(logps.dtype)
    terms = ratio(drift, of_documents, usable)
    result = surrogate(terms)
    terms_of_units, metrics = terms.units.weights * result.loss, {}
    if inputs.sampler_logps is not None:
        metrics = mismatch_metrics(drift, usable)
        if correction is not None:
            corrected = correction(terms.units, drift, usable)
            terms_of_units = corrected.weights * terms_of_units
            metrics |= correction_metrics(corrected, terms.units)
    loss = count_once(terms_of_units, terms.units.counted)
    metrics |= (
        ratio_metrics(drift, terms, result, usable)
        | token_metrics(logps.detach(), entropy.detach(), usable)
        | quarantine_metrics(valid, inputs)
    )

    per_token = per_label(of_documents, inputs.label_counts)[inputs.document_index]
    if inputs.ref_logps is not None:
        estimate = kl(torch.where(token_valid, logps, inputs.ref_logps), inputs.ref_logps)
        estimate = torch.where(token_valid, estimate, 0.0)
        metrics["kl_ref"] = (estimate.detach().sum(), token_valid.sum())
        loss = loss + kl_coef * (per_token * estimate).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (per_token * torch.where(token_valid, entropy, 0.0)).sum()
    return loss, metrics


def _sequence_exponent(units: Units, drift: Drift, inputs: LossInputs) -> Tensor:  # [T]
    """``sg(mean l) + l_t - sg(l_t)``: the document's mean in value, the token's own log-ratio in gradient."""
    means = per_label(drift.documents[0].detach(), inputs.label_counts)
    return means[units.document] + (units.log_ratio - units.log_ratio.detach())


def _bounded(units: Units, exponent: Tensor, low: float, high: float) -> RatioTerms:
    return RatioTerms(units, exponent.clamp(low, high), (exponent < low) | (exponent > high))
