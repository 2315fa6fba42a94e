"""Registered loss components: what a config names under ``loss._component_``.

Each is a named composition of the pure functions in :mod:`gspo.functional`, without parameters of its own. A loss takes
log-probabilities, not logits, and returns undivided sums; the recipe divides by the counts of the optimizer step.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from gspo import functional as F
from gspo.errors import InputError


class _PolicyLoss(nn.Module):
    """Checks the knobs that every objective shares and holds the composition."""

    def __init__(
        self,
        *,
        ratio: F.RatioLevel,
        surrogate: F.Surrogate,
        aggregation: str,
        normalize_by_documents: bool,
        constant_length: int | None,
        kl_coef: float,
        kl_estimator: str,
        entropy_coef: float,
    ) -> None:
        super().__init__()
        if aggregation not in F.AGGREGATIONS:
            raise InputError(f"loss.aggregation is {aggregation!r}: it must be one of {', '.join(F.AGGREGATIONS)}.")
        if kl_estimator not in F.KL_ESTIMATORS:
            raise InputError(f"loss.kl_estimator is {kl_estimator!r}: it must be one of {', '.join(F.KL_ESTIMATORS)}.")
        for key, coefficient in (("kl_coef", kl_coef), ("entropy_coef", entropy_coef)):
            if not coefficient >= 0:
                raise InputError(f"loss.{key} is {coefficient}: it must be 0 or more.")
        if aggregation == "constant" and not constant_length:
            raise InputError("loss.aggregation is 'constant': set loss.constant_length to the length it divides by.")
        if normalize_by_documents and aggregation == "constant":
            raise InputError("loss.normalize_by_documents contradicts loss.aggregation 'constant': drop one of them.")
        if normalize_by_documents and aggregation == "token":
            aggregation = "token_over_documents"
        self.aggregation = aggregation
        self.constant_length = constant_length
        self.kl_coef = kl_coef
        self.entropy_coef = entropy_coef
        self._objective = partial(
            F.policy_objective,
            ratio=ratio,
            surrogate=surrogate,
            aggregation=aggregation,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            entropy_coef=entropy_coef,
        )

    def forward(self, logps: Tensor, entropy: Tensor, inputs: F.LossInputs) -> tuple[Tensor, F.MetricSums]:
        """Undivided loss sum and metric sums of whole documents; ``logps`` and ``entropy`` are [T] in nats."""
        return self._objective(logps, entropy, inputs)

    def denominator(self, num_documents: int, num_label_tokens: int) -> float:
        """What the loss sum is divided by, from the totals of the optimizer step."""
        return F.loss_denominator(
            num_documents, num_label_tokens, aggregation=self.aggregation, constant_length=self.constant_length
        )


class GSPOLoss(_PolicyLoss):
    """Group sequence policy optimization: one clipped ratio per document (arXiv 2507.18071, eq. 5 to 7).

    Args:
        clip_low: lower width of the band around 1, >= 0. The paper's is 3e-4.
        clip_high: upper width, >= 0. The paper's is 4e-4.
        aggregation: ``document`` (the paper: every document weighs 1, over documents), ``token`` (a document weighs its
            tokens, over tokens), ``token_over_documents`` (its tokens, over documents) or ``constant`` (its tokens,
            over documents times ``constant_length``).
        normalize_by_documents: turns ``token`` into ``token_over_documents``.
        constant_length: tokens, for ``aggregation: constant``.
        log_ratio_bound: nats; the mean log-ratio is clamped to plus and minus this before ``exp``.
        kl_coef: weight of the KL to the reference policy, 0 = none. Needs a reference policy in the config.
        kl_estimator: ``k1``, ``k2`` or ``k3``.
        entropy_coef: weight of the entropy bonus, 0 = none.

    Raises:
        InputError: for a value outside these.
    """

    def __init__(
        self,
        *,
        clip_low: float = 3e-4,
        clip_high: float = 4e-4,
        aggregation: str = "document",
        normalize_by_documents: bool = False,
        constant_length: int | None = None,
        log_ratio_bound: float = 10.0,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(
            ratio=partial(F.document_ratio, bound=_positive("log_ratio_bound", log_ratio_bound)),
            surrogate=_clipped(clip_low, clip_high),
            aggregation=aggregation,
            normalize_by_documents=normalize_by_documents,
            constant_length=constant_length,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            entropy_coef=entropy_coef,
        )


class GRPOLoss(_PolicyLoss):
    """Group relative policy optimization: one clipped ratio per token (arXiv 2402.03300, eq. 3).

    Args:
        clip_low: lower width of the band around 1, >= 0.
        clip_high: upper width, >= 0; larger than ``clip_low`` is DAPO's clip-higher (arXiv 2503.14476).
        aggregation: ``document`` (the mean over a document's tokens, then over documents), ``token`` (DAPO),
            ``token_over_documents`` or ``constant`` (Dr. GRPO, arXiv 2503.20783).
        normalize_by_documents: turns ``token`` into ``token_over_documents``.
        constant_length: tokens, for ``aggregation: constant``.
        log_ratio_bound: nats; a token's log-ratio is clamped to plus and minus this before ``exp``.
        kl_coef: weight of the KL to the reference policy, 0 = none. Needs a reference policy in the config.
        kl_estimator: ``k1``, ``k2`` or ``k3``.
        entropy_coef: weight of the entropy bonus, 0 = none.

    Raises:
        InputError: for a value outside these.
    """

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        aggregation: str = "document",
        normalize_by_documents: bool = False,
        constant_length: int | None = None,
        log_ratio_bound: float = 10.0,
        kl_coef: float = 0.0,
        kl_estimator: str = "k3",
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(
            ratio=partial(F.token_ratio, bound=_positive("log_ratio_bound", log_ratio_bound)),
            surrogate=_clipped(clip_low, clip_high),
            aggregation=aggregation,
            normalize_by_documents=normalize_by_documents,
            constant_length=constant_length,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            entropy_coef=entropy_coef,
        )


def _clipped(clip_low: float, clip_high: float) -> F.Surrogate:
    if not 0 <= clip_low <= 1:
        raise InputError(f"loss.clip_low is {clip_low}: it is the width below 1 and must lie in [0, 1].")
    if clip_high < 0:
        raise InputError(f"loss.clip_high is {clip_high}: it is the width above 1 and must not be negative.")
    return partial(F.clipped_surrogate, clip_low=clip_low, clip_high=clip_high)


def _positive(key: str, value: float) -> float:
    if not value > 0:
        raise InputError(f"loss.{key} is {value}: it must be positive.")
    return value
