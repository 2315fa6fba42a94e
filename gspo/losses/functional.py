"""Policy objectives as pure functions of ``[T]`` and ``[D]`` tensors.

An objective is three choices, composed: the level of the importance ratio (token, document,
segment, and mixes), the surrogate, and the aggregation (what one document weighs). Each function
here makes one of them; :func:`policy_objective` puts them together and returns undivided sums, so
that the caller divides by the counts of the whole optimizer step.

Not here: the logits (see :mod:`gspo.kernels`), the denominators over ranks, and any reduction over
processes.

T tokens, D documents, K units of the ratio: tokens, segments or documents. Everything is float32 or
float64, whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gspo.errors import NO_VALUE, InputError
from gspo.losses.accounting import (
    correction_metrics,
    count_not_finite,
    kl_metrics,
    mismatch_metrics,
    quarantine_metrics,
    ratio_metrics,
    token_metrics,
)
from gspo.losses.inputs import LossInputs, LossOutput
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
from gspo.metrics import Metrics

RatioLevel = Callable[[Drift, Tensor, LossInputs], RatioTerms]  # the tensor: document weights [D]
Surrogate = Callable[[RatioTerms], SurrogateTerms]
Correction = Callable[[Units, Drift, LossInputs], Corrected]
DocumentWeights = Callable[[Tensor], Tensor]  # [D] labelled tokens -> [D]
KLEstimator = Callable[[Tensor, Tensor], Tensor]  # [T] new and reference log-probabilities -> [T]


def equal_weights(label_counts: Tensor) -> Tensor:  # [D] -> [D]
    """Weigh every document that has a label as 1."""
    return label_counts > 0


def token_weights(label_counts: Tensor) -> Tensor:  # [D] -> [D]
    """Weigh a document as its labelled tokens."""
    return label_counts


def over_documents(num_documents: int, num_label_tokens: int) -> float:
    """Divide by the documents of the optimizer step, over all ranks and microbatches."""
    return float(num_documents)


def over_tokens(num_documents: int, num_label_tokens: int) -> float:
    """Divide by the labelled tokens of the optimizer step."""
    return float(num_label_tokens)


def over_constant_length(
    num_documents: int, num_label_tokens: int, *, constant_length: int
) -> float:
    """Divide by the documents times a fixed number of tokens.

    Dr. GRPO, arXiv 2503.20783, appendix.
    """
    num_tokens = num_documents * constant_length
    return float(num_tokens)


def over_batch_size(num_documents: int, num_label_tokens: int, *, batch_size: int) -> float:
    """Divide by a fixed number, however many documents the step has."""
    return float(batch_size)


class Aggregation(NamedTuple):
    """The weight of a document, and the number that the sum is divided by."""

    weights: DocumentWeights
    denominator: Callable[..., float]


AGGREGATIONS: dict[str, Aggregation] = {
    "document": Aggregation(equal_weights, over_documents),
    "token": Aggregation(token_weights, over_tokens),
    "token_over_documents": Aggregation(token_weights, over_documents),
    "constant": Aggregation(token_weights, over_constant_length),
    "token_over_batch_size": Aggregation(token_weights, over_batch_size),
}


def document_ratio(
    drift: Drift,
    weights: Tensor,  # [D]
    inputs: LossInputs,
    *,
    bound: float = 10.0,
    length_exponent: float = 1.0,
) -> RatioTerms:
    """Return the sequence ratio ``exp(sum of l_t / N^g)``.

    At g = 1 it is ``s``, the geometric mean of the token ratios (GSPO, arXiv 2507.18071, eq. 7).
    """
    units = document_units(drift, weights, inputs)
    num_tokens = _num_tokens(units)
    power = 1 - length_exponent
    mean_to_sum = num_tokens**power  # to sum / N^g
    exponent = units.log_ratio * mean_to_sum
    return _bounded(units, exponent, -bound, bound)


def segment_ratio(
    drift: Drift,
    weights: Tensor,  # [D]
    inputs: LossInputs,
    *,
    bound: float = 10.0,
) -> RatioTerms:
    """Return GSPO's ratio of each segment.

    A document's weight is spread over its segments by their labelled tokens. At a ratio of 1 the
    gradient is GSPO's, whatever the segments. One per document is GSPO, one per token is GRPO.

    Raises:
        InputError: There are no segments.
    """
    if inputs.segments is None:
        raise InputError(
            "segments",
            NO_VALUE,
            "the objective has a ratio per segment, but the documents have none",
            "let the run cut them, e.g. with segments._component_=gspo.data.segments.AtDelimiter "
            "(a batch of your own needs a segment_index), or name gspo.losses.GSPOLoss",
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
    """Return the ratio ``r_t`` of each token (GRPO, arXiv 2402.03300, eq. 3).

    A document's weight is spread evenly over its tokens.
    """
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
    """Return ``s`` for each token, with a gradient through ``logp_t`` alone.

    GSPO-token, arXiv 2507.18071, eq. 14: tokens of a document may have different advantages. The
    weights are as in GRPO. With ``bound_below`` False only large ratios are bounded, as in verl.
    """
    units = token_units(drift, weights, inputs)
    exponent = _sequence_exponent(units, drift, inputs)
    lowest = -bound if bound_below else -math.inf
    return _bounded(units, exponent, lowest, bound)


def mixed_ratio(
    drift: Drift,
    weights: Tensor,  # [D]
    inputs: LossInputs,
    *,
    token_share: float,
    bound: float = 10.0,
) -> RatioTerms:
    """Return ``exp(a l_t + (1 - a) mean l)``, with a gradient through ``logp_t`` alone.

    ``token_share`` a = 1 is GRPO's ratio, 0 GSPO-token's. The mean is held still: with a gradient
    of its own, a token's credit would again be spread over its document.
    """
    units = token_units(drift, weights, inputs)
    of_document = _sequence_exponent(units, drift, inputs)
    document_share = 1 - token_share
    token_term = token_share * units.log_ratio
    document_term = document_share * of_document
    exponent = token_term + document_term
    return _bounded(units, exponent, -bound, bound)


def _sequence_exponent(units: Units, drift: Drift, inputs: LossInputs) -> Tensor:  # [T]
    """Return ``sg(mean l) + l_t - sg(l_t)``: the document's mean, with the token's own gradient."""
    sums = drift.documents.log_ratio.detach()
    means = per_label(sums, inputs.label_counts)
    log_ratio = units.log_ratio
    gradient_alone = log_ratio - log_ratio.detach()
    values = means[units.document]
    return values + gradient_alone


def _num_tokens(units: Units) -> Tensor:  # [K] of the ratio's dtype, at least 1
    num_tokens = units.num_tokens.clamp(min=1)
    return num_tokens.to(units.log_ratio.dtype)


def _bounded(units: Units, exponent: Tensor, low: float, high: float) -> RatioTerms:
    is_below = exponent < low
    is_above = exponent > high
    is_outside = is_below | is_above
    bounded = exponent.clamp(low, high)
    return RatioTerms(units, bounded, is_outside)


def token_truncated(
    units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float
) -> Corrected:
    """Weigh each token by ``min(r_t, high)``; units must be tokens.

    Truncated importance sampling, Ionides 2008, doi 10.1198/106186008X320456.
    """
    ratio = _exp(units.mismatch)
    return _truncated(ratio, high)


def token_masked(
    units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float
) -> Corrected:
    """Weigh each token by ``r_t``, and by 0 outside [low, high], as IcePop does.

    Units must be tokens.
    """
    ratio = _exp(units.mismatch)
    is_below = ratio < low
    is_above = ratio > high
    is_outside = is_below | is_above
    weights = torch.where(is_outside, 0.0, ratio)
    return Corrected(ratio, weights, is_outside)


def sequence_product(
    units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float
) -> Corrected:
    """Weigh each unit by ``min(product of r_t, high)`` of its document.

    It is unbiased but for the bound, and varies widely for long documents.
    """
    sums = drift.documents.mismatch
    unit_sums = sums[units.document]
    ratio = _exp(unit_sums)
    return _truncated(ratio, high)


def sequence_geometric(
    units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float
) -> Corrected:
    """Weigh each unit by ``min(geometric mean of r_t, high)`` of its document.

    This is GSPO's ratio, of the mismatch.
    """
    sums = drift.documents.mismatch
    means = per_label(sums, inputs.label_counts)
    unit_means = means[units.document]
    ratio = _exp(unit_means)
    return _truncated(ratio, high)


def _exp(log_ratio: Tensor) -> Tensor:
    fixed = log_ratio.detach()
    bounded = fixed.clamp(-20.0, 20.0)
    return bounded.exp()


def _truncated(ratio: Tensor, high: float) -> Corrected:
    weights = ratio.clamp(max=high)
    is_changed = ratio > high
    return Corrected(ratio, weights, is_changed)


CORRECTIONS: dict[str, Callable[..., Corrected]] = {
    "token_tis": token_truncated,
    "token_mask": token_masked,
    "sequence_product": sequence_product,
    "sequence_geometric": sequence_geometric,
}
TOKEN_CORRECTIONS = frozenset({"token_tis", "token_mask"})  # their units must be tokens


def unclipped_surrogate(terms: RatioTerms) -> SurrogateTerms:
    """Return ``-r A``: importance sampling, with nothing clipped."""
    ratio = terms.log_ratio.exp()
    advantages = terms.units.advantages
    loss = -ratio * advantages
    nowhere = torch.zeros_like(terms.bounded)
    return SurrogateTerms(loss, outside=nowhere, low=nowhere, high=nowhere)


def clipped_surrogate(terms: RatioTerms, *, clip_low: float, clip_high: float) -> SurrogateTerms:
    """Return ``-min(r A, clip(r, 1 - low, 1 + high) A)`` (PPO, arXiv 1707.06347, eq. 7).

    An infinite width does not clip.
    """
    lowest = 1 - clip_low
    highest = 1 + clip_high
    ratio = terms.log_ratio.exp()
    clipped = ratio.clamp(lowest, highest)
    below = ratio < lowest
    above = ratio > highest
    return _pessimistic(ratio, clipped, terms.units.advantages, below, above)


def _pessimistic(
    ratio: Tensor,  # [K]
    clipped: Tensor,  # [K] the ratio inside the clip range
    advantages: Tensor,  # [K]
    below: Tensor,  # [K] bool, ratio below the clip range
    above: Tensor,  # [K] bool
) -> SurrogateTerms:
    """Return ``-min(r A, clipped A)``, whose gradient vanishes where the clipped term is less."""
    free_term = ratio * advantages
    clipped_term = clipped * advantages
    smaller = torch.minimum(free_term, clipped_term)
    is_negative = advantages < 0
    is_positive = advantages > 0
    return SurrogateTerms(
        loss=-smaller,
        outside=below | above,
        low=below & is_negative,
        high=above & is_positive,
    )


def dual_clipped_surrogate(
    terms: RatioTerms, *, clip_low: float, clip_high: float, dual_clip: float
) -> SurrogateTerms:
    """Return the clipped surrogate, and for A < 0 at most ``-c A``, c > 1.

    From arXiv 1912.09729, eq. 5.
    """
    clipped = clipped_surrogate(terms, clip_low=clip_low, clip_high=clip_high)
    advantages = terms.units.advantages
    log_cap = math.log(dual_clip)
    is_above_cap = terms.log_ratio > log_cap
    is_negative = advantages < 0
    capped = is_above_cap & is_negative
    largest_loss = -dual_clip * advantages
    return SurrogateTerms(
        loss=torch.where(capped, largest_loss, clipped.loss),
        outside=clipped.outside | capped,
        low=clipped.low,
        high=clipped.high | capped,
    )


def cispo_surrogate(terms: RatioTerms, *, clip_low: float, clip_high: float) -> SurrogateTerms:
    """Return ``-sg(clip(r, 1 - low, 1 + high)) A logp`` (CISPO, arXiv 2506.13585, eq. 4 and 5).

    No gradient vanishes.
    """
    lowest = 1 - clip_low
    highest = 1 + clip_high
    log_ratio = terms.log_ratio.detach()
    ratio = log_ratio.exp()
    truncated = ratio.clamp(lowest, highest)
    units = terms.units
    advantages = units.advantages
    coefficients = -truncated * advantages
    loss = coefficients * units.logps
    outside = ratio != truncated
    nowhere = torch.zeros_like(terms.bounded)
    return SurrogateTerms(loss, outside, low=nowhere, high=nowhere)


def length_fair_surrogate(
    terms: RatioTerms, *, clip_low: float, clip_high: float
) -> SurrogateTerms:
    """Return the clipped surrogate with a clip range of ``-low sqrt(N)`` to ``high sqrt(N)`` nats.

    FSPO, arXiv 2509.09177, for the product ratio, whose log spreads as sqrt(N): documents of all
    lengths are then clipped alike.
    """
    log_ratio = terms.log_ratio
    num_tokens = _num_tokens(terms.units)
    root = num_tokens.sqrt()
    lowest = -clip_low * root
    highest = clip_high * root
    below = log_ratio < lowest
    above = log_ratio > highest
    bounded_below = torch.maximum(log_ratio, lowest)
    bounded = torch.minimum(bounded_below, highest)
    ratio = log_ratio.exp()
    clipped = bounded.exp()
    return _pessimistic(ratio, clipped, terms.units.advantages, below, above)


def k1(new_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return ``log(new / ref)``, unbiased.

    All three are per token, in nats (Schulman, "Approximating KL divergence").
    """
    return new_logps - ref_logps


def k2(new_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return ``log(new / ref)^2 / 2``, biased, whose gradient is the KL's."""
    delta = new_logps - ref_logps
    return 0.5 * delta.square()


def k3(new_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return ``ref / new - 1 - log(ref / new)``, unbiased and never negative."""
    delta = new_logps - ref_logps
    ratio_minus_one = torch.expm1(-delta)
    return ratio_minus_one + delta


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
) -> LossOutput:
    """Return the undivided loss sum and its metrics.

    Collective where documents span ranks, see :class:`~gspo.losses.inputs.LossInputs`. A document
    with a value that is not finite is quarantined: it counts in ``not_finite`` (and its metric
    ``quarantined_documents``) and nowhere else.
    """
    drift = measure_drift(logps, inputs)
    trained = _valid_inputs(inputs, drift)
    document_weights = _valid_weights(weights, drift, inputs)

    terms = ratio(drift, document_weights, trained)
    result = surrogate(terms)
    unit_losses = terms.units.weights * result.loss
    metrics: Metrics = {}
    if inputs.sampler_logps is not None:
        metrics |= mismatch_metrics(drift, trained)
        if correction is not None:
            corrected = correction(terms.units, drift, trained)
            metrics |= correction_metrics(corrected, terms.units)
            unit_losses = corrected.weights * unit_losses
    loss = count_once(unit_losses, terms.units.counted)

    not_finite = count_not_finite(drift.valid, inputs)
    metrics |= ratio_metrics(drift, terms, result, trained)
    metrics |= token_metrics(logps.detach(), entropy.detach(), trained)
    metrics |= quarantine_metrics(not_finite)

    token_weights = _spread_over_tokens(document_weights, inputs)
    if inputs.ref_logps is not None:
        divergence = _reference_kl(logps, inputs.ref_logps, drift.token_valid, kl)
        penalty = _weighted_sum(divergence, token_weights)
        loss = loss + kl_coef * penalty
        metrics |= kl_metrics(divergence.detach(), drift)
    if entropy_coef:
        valid_entropy = torch.where(drift.token_valid, entropy, 0.0)
        bonus = _weighted_sum(valid_entropy, token_weights)
        loss = loss - entropy_coef * bonus
    return LossOutput(loss, metrics, not_finite)


def _valid_inputs(inputs: LossInputs, drift: Drift) -> LossInputs:
    """Return the inputs with nothing to train in documents that are not valid."""
    advantages = torch.where(drift.valid, inputs.advantages, 0.0)
    return replace(inputs, loss_mask=drift.token_valid, advantages=advantages)


def _valid_weights(weights: DocumentWeights, drift: Drift, inputs: LossInputs) -> Tensor:  # [D]
    """Return what each document weighs, 0 where it is not valid."""
    all_weights = weights(inputs.label_counts)
    valid_weights = torch.where(drift.valid, all_weights, 0)
    return valid_weights.to(drift.logps.dtype)


def _spread_over_tokens(
    weights: Tensor,  # [D]
    inputs: LossInputs,
) -> Tensor:  # [T]
    """Spread each document's weight evenly over its tokens."""
    token_weights = per_label(weights, inputs.label_counts)
    return token_weights[inputs.document_index]


def _weighted_sum(
    values: Tensor,  # [T]
    weights: Tensor,  # [T]
) -> Tensor:  # []
    weighted = weights * values
    return weighted.sum()


def _reference_kl(
    logps: Tensor,  # [T] nats
    ref_logps: Tensor,  # [T] nats
    valid: Tensor,  # [T] bool
    kl: KLEstimator,
) -> Tensor:  # [T] nats, 0 where not valid
    finite_logps = torch.where(valid, logps, ref_logps)  # no NaN in the gradient of the others
    estimate = kl(finite_logps, ref_logps)
    return torch.where(valid, estimate, 0.0)
