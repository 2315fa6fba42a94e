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


def _here(sums: Tensor) -> Tensor:
    """Documents that are whole on this rank have their sums here."""
    return sums


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
    complete: Callable[[Tensor], Tensor] = _here  # [..., D] sums over the tokens here, to sums over all; same gradient


@dataclass(frozen=True, slots=True)
class RatioTerms:
    """The importance ratio at one level, over K units: documents or tokens."""

    log_ratio: Tensor  # [K] nats, bounded; 0 where not valid
    bounded: Tensor  # [K] bool, True where the bound changed it
    advantages: Tensor  # [K]
    weights: Tensor  # [K], the unit's share in the undivided sum; 0 where not valid
    valid: Tensor  # [K] bool
    counted: Tensor  # [K] bool, valid and added up on this rank
    document: Tensor | None  # [K] int64, the unit's document; None where units are the documents
    num_tokens: Tensor  # [K] int64, labelled tokens whose gradient the unit carries


@dataclass(frozen=True, slots=True)
class SurrogateTerms:
    """A surrogate's loss and where its ratio is outside the band, over K units."""

    loss: Tensor  # [K]
    outside: Tensor  # [K] bool, ratio outside the band, on either side
    low: Tensor  # [K] bool, the gradient vanishes at the low edge
    high: Tensor  # [K] bool, the gradient vanishes at the high edge


RatioLevel = Callable[[Tensor, Tensor, Tensor, Tensor, LossInputs], RatioTerms]
Surrogate = Callable[[Tensor, Tensor], SurrogateTerms]


def document_sums(
    values: Tensor,  # [..., T]
    inputs: LossInputs,
) -> Tensor:  # [..., D]
    """Sums of ``values`` over each document's labelled tokens, wherever these are. Collective over a context group."""
    picked = torch.where(inputs.loss_mask, values, 0.0)  # not a product: -inf * 0 is nan
    totals = picked.new_zeros(*values.shape[:-1], inputs.label_counts.numel())
    return inputs.complete(totals.index_add(-1, inputs.document_index, picked))


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
    log_ratio: Tensor,  # [T] new - old log-probability, 0 where not valid
    mean_log_ratio: Tensor,  # [D] over each document's labelled tokens, 0 where not valid
    weights: Tensor,  # [D] of document_weights
    valid: Tensor,  # [D] bool
    inputs: LossInputs,
    *,
    bound: float = 10.0,
) -> RatioTerms:
    """Length-normalised sequence ratio, ``s = exp(mean of log r_t)`` (GSPO, arXiv 2507.18071, eq. 7)."""
    return RatioTerms(
        log_ratio=mean_log_ratio.clamp(-bound, bound),
        bounded=mean_log_ratio.abs() > bound,
        advantages=inputs.advantages,
        weights=torch.where(valid, weights, 0.0),
        valid=valid,
        counted=_counted(valid, inputs),
        document=None,
        num_tokens=inputs.label_counts,
    )


def token_ratio(
    log_ratio: Tensor,  # [T]
    mean_log_ratio: Tensor,  # [D], not used
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
        counted=token_valid,
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
    """The undivided loss sum and its metric sums. Collective where documents span ranks, see :class:`LossInputs`.

    A document whose log-ratio is not finite is quarantined: it counts in ``quarantined_documents``
    (and ``_late_documents`` and ``_late_tokens``, which mend the denominators) and nowhere else.
    """
    log_ratio, means, valid, token_valid = _log_ratios(logps, inputs)
    usable = replace(inputs, loss_mask=token_valid, advantages=torch.where(valid, inputs.advantages, 0.0))
    weights = document_weights(inputs.label_counts, aggregation=aggregation, dtype=logps.dtype)
    terms = ratio(log_ratio, means, weights, valid, usable)
    result = surrogate(terms.log_ratio, terms.advantages)
    loss = count_once(terms.weights * result.loss, terms.counted)
    metrics = (
        _ratio_metrics(log_ratio.detach(), means.detach(), terms, result, usable)
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


def _log_ratios(logps: Tensor, inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-ratios [T] and their document means [D], 0 where not valid; valid documents [D] and labelled tokens [T].

    A document is valid if its every value is finite. One sum over a context group serves both.
    """
    found = logps - inputs.old_logps
    finite = found.detach().isfinite()
    if inputs.ref_logps is not None:
        finite &= inputs.ref_logps.isfinite()
    log_ratio = torch.where(inputs.loss_mask & finite, found, 0.0)
    totals, num_bad = document_sums(torch.stack((log_ratio, (~finite).to(log_ratio.dtype))), inputs)
    valid = (inputs.label_counts > 0) & (num_bad == 0) & totals.isfinite() & inputs.advantages.isfinite()
    token_valid = inputs.loss_mask & valid[inputs.document_index]
    means = torch.where(valid, totals, 0.0) / inputs.label_counts.clamp(min=1)
    return torch.where(token_valid, log_ratio, 0.0), means, valid, token_valid


def _counted(values: Tensor, inputs: LossInputs) -> Tensor:  # [..., D]
    """What each document has, False or 0 where another rank counts it."""
    return values if inputs.counted is None else torch.where(inputs.counted, values, torch.zeros_like(values))


def _documents_with(flags: Tensor, terms: RatioTerms, inputs: LossInputs) -> Tensor:  # [N, K] bool -> [N]
    """How many documents counted here have a valid unit with each of N flags."""
    if terms.document is None:
        return (flags & terms.counted).sum(-1)
    hits = terms.weights.new_zeros(flags.shape[0], inputs.label_counts.numel())
    hits = inputs.complete(hits.index_add(-1, terms.document, (flags & terms.valid).to(hits.dtype)))
    return _counted(hits > 0, inputs).sum(-1)


def _ratio_metrics(
    log_ratio: Tensor, means: Tensor, terms: RatioTerms, result: SurrogateTerms, inputs: LossInputs
) -> MetricSums:
    """Ratios in the objective's own units, what the clip does to them, and how far the policy is from the sampler's.

    ``any`` counts ratios outside the band, ``binding`` only those whose gradient the clip stops.
    """
    ratio = terms.log_ratio.detach().exp()
    binding = result.low | result.high
    flags = torch.stack((terms.valid, terms.bounded, result.outside, binding))
    documents, bounded, outside, bound = _documents_with(flags, terms, inputs)
    units, tokens = terms.counted.sum(), inputs.loss_mask.sum()
    k3 = torch.expm1(log_ratio.clamp(-20, 20)) - log_ratio
    one = ratio.new_ones(())
    return {
        "ratio/mean": (torch.where(terms.counted, ratio, 0.0).sum(), units),
        "_ratio_sq": (torch.where(terms.counted, ratio.square(), 0.0).sum(), units),
        "ratio/max": (_largest(torch.where(terms.valid, ratio, -torch.inf)), one),
        "ratio/min": (-_largest(torch.where(terms.valid, -ratio, -torch.inf)), one),
        "bounded_documents": (bounded, one),
        "kl_new_old": (k3.sum(), documents),
        "_log_ratio_sq": (log_ratio.square().sum(), tokens),
        "log_ratio/abs_document": (_counted(means.abs(), inputs).sum(), documents),
        "clip/any_document": (outside, documents),
        "clip/binding_document": (bound, documents),
        "clip/binding_token": (torch.where(binding & terms.counted, terms.num_tokens, 0).sum(), tokens),
        "clip/low": ((result.low & terms.counted).sum(), units),
        "clip/high": ((result.high & terms.counted).sum(), units),
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
