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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gspo.errors import InputError

LENGTH_BINS = (64, 256, 1024)  # labelled tokens, upper ends
MetricSums = dict[str, tuple[Tensor, Tensor]]  # name -> (value sum, weight sum), see gspo.metrics


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
    counted: Tensor | None = None  # [D] bool, each document on one rank of its context group; None: all of them
    complete: Callable[[Tensor], Tensor] = _here  # [..., K] sums over the tokens here, to sums over all; same gradient
    segments: Segments | None = None  # all of them on every rank of a context group, as documents are
    token_advantages: Tensor | None = None  # [T], in place of the documents'; a larger unit has the mean of its tokens'
    sampler_logps: Tensor | None = None  # [T] nats, of the sampler, where ``old_logps`` are the trainer's own


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

    log_ratio: Tensor  # [K] nats, mean over the unit's labelled tokens; 0 where not valid, as the next
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


RatioLevel = Callable[[Drift, Tensor, LossInputs], RatioTerms]  # of a drift, document weights [D] and the inputs
Surrogate = Callable[[RatioTerms], SurrogateTerms]
Correction = Callable[[Units, Drift, LossInputs], "Corrected"]
DocumentWeights = Callable[[Tensor], Tensor]  # [D] labelled tokens -> [D]
KLEstimator = Callable[[Tensor, Tensor], Tensor]  # [T] new and reference log-probabilities -> [T]


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
        raise ValueError("segment_index: a segment lies in two documents; number segments through the batch")
    return Segments(torch.where(loss_mask, index, 0), document, counts)


def document_sums(
    values: Tensor,  # [..., T]
    inputs: LossInputs,
) -> Tensor:  # [..., D]
    """Sums of ``values`` over each document's labelled tokens, wherever these are. Collective over a context group."""
    picked = torch.where(inputs.loss_mask, values, 0.0)  # not a product: -inf * 0 is nan
    return inputs.complete(_sums(picked, inputs.document_index, inputs.label_counts.numel()))


def document_means(
    values: Tensor,  # [..., T]
    inputs: LossInputs,
) -> Tensor:  # [..., D]
    """Means of ``values`` over each document's labelled tokens; 0 for one without any. See :func:`document_sums`."""
    return document_sums(values, inputs) / inputs.label_counts.clamp(min=1)


def count_once(
    terms: Tensor,  # [K]
    counted: Tensor,  # [K] bool
) -> Tensor:  # []
    """The sum of ``terms`` that are counted here, with the gradient of all of them."""
    return torch.where(counted, terms, terms - terms.detach()).sum()


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


def over_constant_length(num_documents: int, num_label_tokens: int, *, constant_length: int) -> float:
    """Divide by the documents times a fixed number of tokens (Dr. GRPO, arXiv 2503.20783, appendix)."""
    return float(num_documents * constant_length)


def over_batch_size(num_documents: int, num_label_tokens: int, *, batch_size: int) -> float:
    """Divide by a fixed number, however many documents the step has."""
    return float(batch_size)


AGGREGATIONS: dict[str, tuple[DocumentWeights, Callable[..., float]]] = {  # what a document weighs, and over what
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
    return _bounded(units, _sequence_exponent(units, drift, inputs), -bound if bound_below else -math.inf, bound)


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
    exponent = token_share * units.log_ratio + (1 - token_share) * _sequence_exponent(units, drift, inputs)
    return _bounded(units, exponent, -bound, bound)


@dataclass(frozen=True, slots=True)
class Corrected:
    """Importance weights from the sampler's to the trainer's own old log-probabilities, over K units; no gradient."""

    ratio: Tensor  # [K]
    weights: Tensor  # [K], of the unit's term
    changed: Tensor  # [K] bool, where these differ


def token_truncated(units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float) -> Corrected:
    """``min(r_t, high)`` for each token (truncated importance sampling; Ionides 2008, doi 10.1198/106186008X320456).

    Each unit has the ratio of its mean, so units must be tokens.
    """
    return _truncated(_exp(units.mismatch), high)


def token_masked(units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float) -> Corrected:
    """``r_t``, and 0 outside [low, high] (as IcePop does); units must be tokens."""
    ratio = _exp(units.mismatch)
    outside = (ratio < low) | (ratio > high)
    return Corrected(ratio, torch.where(outside, 0.0, ratio), outside)


def sequence_product(units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float) -> Corrected:
    """``min(product of r_t, high)`` of the unit's document: unbiased but for the bound, and wide for long ones."""
    return _truncated(_exp(drift.documents[3][units.document]), high)


def sequence_geometric(units: Units, drift: Drift, inputs: LossInputs, *, low: float, high: float) -> Corrected:
    """``min(geometric mean of r_t, high)`` of the unit's document: GSPO's ratio, of the mismatch."""
    means = drift.documents[3] / inputs.label_counts.clamp(min=1)
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
    return SurrogateTerms(-terms.log_ratio.exp() * terms.units.advantages, nowhere, nowhere, nowhere)


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


def dual_clipped_surrogate(terms: RatioTerms, *, clip_low: float, clip_high: float, dual_clip: float) -> SurrogateTerms:
    """The clipped surrogate, and for A < 0 at most ``-c A``, c > 1 (arXiv 1912.09729, eq. 5)."""
    found, advantages = clipped_surrogate(terms, clip_low=clip_low, clip_high=clip_high), terms.units.advantages
    capped = (terms.log_ratio > math.log(dual_clip)) & (advantages < 0)
    loss = torch.where(capped, -dual_clip * advantages, found.loss)
    return SurrogateTerms(loss, found.outside | capped, found.low, found.high | capped)


def cispo_surrogate(terms: RatioTerms, *, clip_low: float, clip_high: float) -> SurrogateTerms:
    """``-sg(clip(r, 1 - low, 1 + high)) A logp`` (CISPO, arXiv 2506.13585, eq. 4 and 5): no gradient vanishes."""
    ratio = terms.log_ratio.detach().exp()
    truncated = ratio.clamp(1 - clip_low, 1 + clip_high)
    nowhere = torch.zeros_like(terms.bounded)
    return SurrogateTerms(-truncated * terms.units.advantages * terms.units.logps, ratio != truncated, nowhere, nowhere)


def length_fair_surrogate(terms: RatioTerms, *, clip_low: float, clip_high: float) -> SurrogateTerms:
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
    drift = _drift(logps, inputs)
    valid, token_valid = drift.valid, drift.token_valid
    usable = replace(inputs, loss_mask=token_valid, advantages=torch.where(valid, inputs.advantages, 0.0))
    of_documents = torch.where(valid, weights(inputs.label_counts), 0).to(logps.dtype)
    terms = ratio(drift, of_documents, usable)
    result = surrogate(terms)
    terms_of_units, metrics = terms.units.weights * result.loss, {}
    if inputs.sampler_logps is not None:
        metrics = _mismatch_metrics(drift, usable)
        if correction is not None:
            corrected = correction(terms.units, drift, usable)
            terms_of_units = corrected.weights * terms_of_units
            metrics |= _correction_metrics(corrected, terms.units)
    loss = count_once(terms_of_units, terms.units.counted)
    metrics |= (
        _ratio_metrics(drift, terms, result, usable)
        | _token_metrics(logps.detach(), entropy.detach(), usable)
        | _quarantine_metrics(valid, inputs)
    )

    per_token = (of_documents / inputs.label_counts.clamp(min=1))[inputs.document_index]
    if inputs.ref_logps is not None:
        estimate = kl(torch.where(token_valid, logps, inputs.ref_logps), inputs.ref_logps)
        estimate = torch.where(token_valid, estimate, 0.0)
        metrics["kl_ref"] = (estimate.detach().sum(), token_valid.sum())
        loss = loss + kl_coef * (per_token * estimate).sum()
    if entropy_coef:
        loss = loss - entropy_coef * (per_token * torch.where(token_valid, entropy, 0.0)).sum()
    return loss, metrics


def _drift(logps: Tensor, inputs: LossInputs) -> Drift:
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
    mismatch = torch.zeros_like(found) if inputs.sampler_logps is None else inputs.old_logps - inputs.sampler_logps
    picked = [torch.where(trained, values, 0.0) for values in (found, logps, given, mismatch)]
    rows = torch.stack((*picked, (inputs.loss_mask & ~finite).to(found.dtype)))
    if inputs.segments is None:
        segments, documents = None, document_sums(rows, inputs)
    else:
        index, owner = inputs.segments.index, inputs.segments.document
        segments = inputs.complete(_sums(rows, index, owner.numel()))
        documents = _sums(segments, owner, inputs.label_counts.numel())
    *_, num_bad = documents
    valid = (inputs.label_counts > 0) & (num_bad == 0) & documents.isfinite().all(0) & inputs.advantages.isfinite()
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


def _sums(values: Tensor, index: Tensor, size: int) -> Tensor:  # [..., K], [K] in [0, size) -> [..., size]
    return values.new_zeros(*values.shape[:-1], size).index_add(-1, index, values)


def document_units(drift: Drift, weights: Tensor, inputs: LossInputs) -> Units:
    """Documents as units of the ratio; ``weights`` [D] are theirs."""
    own = torch.arange(inputs.label_counts.numel(), device=weights.device)
    return _whole_units(
        drift.documents, Segments(inputs.document_index, own, inputs.label_counts), weights, drift, inputs
    )


def segment_units(drift: Drift, weights: Tensor, inputs: LossInputs, segments: Segments) -> Units:
    """Segments as units; each has the share of its document's weight that it has of the labelled tokens."""
    assert drift.segments is not None, "the drift has the sums of the segments that its inputs have"
    return _whole_units(drift.segments, segments, weights, drift, inputs)


def _whole_units(sums: Tensor, parts: Segments, weights: Tensor, drift: Drift, inputs: LossInputs) -> Units:
    """Units that every rank of a context group has."""
    counts, document = parts.label_counts, parts.document
    valid = drift.valid[document] & (counts > 0)
    log_ratio, logps, advantages, mismatch = torch.where(valid, sums, 0.0) / counts.clamp(min=1)
    share = counts.to(weights.dtype) / inputs.label_counts.clamp(min=1)[document]
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
        complete=_here,
    )


def token_units(drift: Drift, weights: Tensor, inputs: LossInputs) -> Units:
    """Labelled tokens as units, those that are here; a document's weight is spread evenly over its own."""
    valid, document = drift.token_valid, inputs.document_index
    given = inputs.advantages[document] if inputs.token_advantages is None else inputs.token_advantages
    per_token = weights / inputs.label_counts.clamp(min=1)
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


def _sequence_exponent(units: Units, drift: Drift, inputs: LossInputs) -> Tensor:  # [T]
    """``sg(mean l) + l_t - sg(l_t)``: the document's mean in value, the token's own log-ratio in gradient."""
    means = drift.documents[0].detach() / inputs.label_counts.clamp(min=1)
    return means[units.document] + (units.log_ratio - units.log_ratio.detach())


def _bounded(units: Units, exponent: Tensor, low: float, high: float) -> RatioTerms:
    return RatioTerms(units, exponent.clamp(low, high), (exponent < low) | (exponent > high))


def _counted(values: Tensor, inputs: LossInputs) -> Tensor:  # [..., D]
    """What each document has, False or 0 where another rank counts it."""
    return values if inputs.counted is None else torch.where(inputs.counted, values, torch.zeros_like(values))


def _documents_with(flags: Tensor, units: Units, inputs: LossInputs) -> Tensor:  # [N, K] bool -> [N, D] bool
    """Which documents counted here have a valid unit with each of N flags."""
    hits = _sums((flags & units.valid).to(units.weights.dtype), units.document, inputs.label_counts.numel())
    return _counted(units.complete(hits) > 0, inputs)


def _ratio_metrics(drift: Drift, terms: RatioTerms, result: SurrogateTerms, inputs: LossInputs) -> MetricSums:
    """Ratios in the objective's own units, what the clip does to them, and how far the policy is from the sampler's.

    ``any`` counts ratios outside the band, ``binding`` only those whose gradient the clip stops.
    """
    units, ratio = terms.units, terms.log_ratio.detach().exp()
    log_ratio = drift.log_ratio.detach()
    means = drift.documents[0].detach() / inputs.label_counts.clamp(min=1)
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
        "clip/any_token": (torch.where(result.outside & units.counted, units.num_tokens, 0).sum(), tokens),
        "clip/binding_token": (torch.where(binding & units.counted, units.num_tokens, 0).sum(), tokens),
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


def _mismatch_metrics(drift: Drift, inputs: LossInputs) -> MetricSums:
    """What trainer and sampler disagree by, in nats, at the weights that the old log-probabilities are of."""
    mismatch = drift.mismatch.detach()
    means = drift.documents[3].detach() / inputs.label_counts.clamp(min=1)
    return {
        "_mismatch_sq": (mismatch.square().sum(), inputs.loss_mask.sum()),
        "mismatch/abs_document": (_counted(means.abs(), inputs).sum(), _counted(drift.valid, inputs).sum()),
    }


def _correction_metrics(corrected: Corrected, units: Units) -> MetricSums:
    """The correction's ratios before and after they are truncated or masked, over the units of the objective."""
    num_units, one = units.counted.sum(), corrected.ratio.new_ones(())

    def total(values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(units.counted, values, 0.0).sum(), num_units

    return {
        "correction/ratio_mean": total(corrected.ratio),
        "correction/ratio_max": (_largest(torch.where(units.valid, corrected.ratio, -torch.inf)), one),
        "correction/weight_mean": total(corrected.weights),
        "_correction_ratio_sq": total(corrected.ratio.square()),
        "_correction_weight_sq": total(corrected.weights.square()),
        "correction/changed": ((corrected.changed & units.counted).sum(), num_units),
    }


def _largest(values: Tensor) -> Tensor:  # [K] -> [], -inf for K = 0, a microbatch without labels
    return torch.cat((values, values.new_full((1,), -torch.inf))).max()


def _token_metrics(logps: Tensor, entropy: Tensor, inputs: LossInputs) -> MetricSums:
    """Means per labelled token, in nats."""
    tokens = inputs.loss_mask.sum()
    values = {"new_logps": logps, "old_logps": inputs.old_logps, "entropy": entropy}
    return {name: (torch.where(inputs.loss_mask, v, 0.0).sum(), tokens) for name, v in values.items()}


def _quarantine_metrics(valid: Tensor, inputs: LossInputs) -> MetricSums:
    """Documents taken out because a value of theirs is not finite, and their labelled tokens."""
    out = _counted((inputs.label_counts > 0) & ~valid, inputs)
    one = valid.new_ones((), dtype=torch.float32)
    tokens = torch.where(out, inputs.label_counts, 0).sum()
    count = out.sum()
    return {"quarantined_documents": (count, one), "_late_documents": (count, one), "_late_tokens": (tokens, one)}
