"""Registered loss components: what a config names under ``loss._component_``.

Each is a named composition of the pure functions in :mod:`gspo.functional`, without parameters of its own. A loss takes
log-probabilities, not logits, and returns undivided sums; the recipe divides by the counts of the optimizer step.
``python -m gspo presets`` lists what other tools and papers mean by them.

All of them take:

- ``aggregation``: ``document`` (every document weighs 1, over documents), ``token`` (a document weighs its tokens, over
  tokens), ``token_over_documents`` (its tokens, over documents), ``constant`` (its tokens, over documents times
  ``constant_length``) or ``token_over_batch_size`` (its tokens, over ``batch_size``).
- ``normalize_by_documents``: turns ``token`` into ``token_over_documents``.
- ``constant_length``: tokens, for ``constant``. ``batch_size``: documents, for ``token_over_batch_size``.
- ``log_ratio_bound``: nats; the exponent of a ratio is clamped to plus and minus this before ``exp``.
- ``kl_coef``: weight of the KL to the reference policy, 0 = none. Needs a reference policy in the config.
- ``kl_estimator``: ``k1``, ``k2`` or ``k3``.
- ``entropy_coef``: weight of the entropy bonus, 0 = none.
- ``correction``: with ``old_logps: recompute``, the importance weight from the sampler's log-probabilities to these:
  ``token_tis`` (a token's ratio, at most ``correction_high``), ``token_mask`` (a token's ratio, 0 outside
  ``correction_low`` to ``correction_high``), ``sequence_product`` or ``sequence_geometric`` (the document's, at most
  ``correction_high``); null for none. The first two need a loss with a term per token.

and raise an :class:`~gspo.errors.InputError` that names the key for a value outside these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from gspo.errors import InputError
from gspo.losses import functional as F
from gspo.losses.inputs import LossInputs
from gspo.types import MetricSums

_CONSTANTS = {
    "constant": "constant_length",
    "token_over_batch_size": "batch_size",
}  # what an aggregation divides by


@dataclass(kw_only=True, eq=False, repr=False)
class _PolicyLoss(nn.Module):
    """Checks the knobs that every objective shares and holds the composition; the fields are the arguments."""

    ratio_level: ClassVar[str]
    surrogate_name: ClassVar[str] = "clipped"

    aggregation: str = "document"
    normalize_by_documents: bool = False
    constant_length: int | None = None
    batch_size: int | None = None
    log_ratio_bound: float = 10.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    correction: str | None = None
    correction_low: float = 0.5
    correction_high: float = 2.0

    def __post_init__(self) -> None:
        super().__init__()
        self._check_types()
        _one_of("aggregation", self.aggregation, F.AGGREGATIONS)
        _one_of("kl_estimator", self.kl_estimator, F.KL_ESTIMATORS)
        for key in ("kl_coef", "entropy_coef"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")
        _require(
            self.log_ratio_bound > 0, "log_ratio_bound", self.log_ratio_bound, "must be positive"
        )
        if self.normalize_by_documents and self.aggregation in _CONSTANTS:
            raise InputError(
                f"loss.normalize_by_documents contradicts loss.aggregation {self.aggregation!r}: drop one of them."
            )
        if self.normalize_by_documents and self.aggregation == "token":
            self.aggregation = "token_over_documents"
        weights, denominator = F.AGGREGATIONS[self.aggregation]
        self._denominator = partial(denominator, **self._constant())
        self.objective = partial(
            F.policy_objective,
            ratio=self._ratio(),
            surrogate=self._surrogate(),
            weights=weights,
            kl_coef=self.kl_coef,
            kl=F.KL_ESTIMATORS[self.kl_estimator],
            entropy_coef=self.entropy_coef,
            correction=self._correction(),
        )

    def _check_types(self) -> None:
        """YAML and the command line give whatever was typed: a text is true, true is 1, and .inf a number."""
        for field in fields(self):
            key, value, kinds = field.name, getattr(self, field.name), str(field.type).split(" | ")
            if "bool" in kinds:
                _require(isinstance(value, bool), key, repr(value), "must be true or false")
            elif "str" not in kinds and (value is not None or "None" not in kinds):
                number = type(value) is int or (
                    type(value) is float and "float" in kinds and math.isfinite(value)
                )
                whole = " whole" if "int" in kinds else ""
                _require(
                    number,
                    key,
                    repr(value),
                    f"must be a finite{whole} number" + ", or null" * ("None" in kinds),
                )

    def _constant(self) -> dict[str, int]:
        """What the denominator needs beside the step's counts."""
        key = _CONSTANTS.get(self.aggregation)
        if key is None:
            return {}
        value = getattr(self, key)
        if value is None:
            raise InputError(
                f"loss.aggregation is {self.aggregation!r}: set loss.{key} to what it divides by."
            )
        _require(value > 0, key, value, "must be positive")
        return {key: value}

    def _correction(self) -> F.Correction | None:
        if self.correction is None:
            return None
        _one_of("correction", self.correction, F.CORRECTIONS)
        low, high = self.correction_low, self.correction_high
        _require(0 <= low <= 1, "correction_low", low, "must lie in [0, 1]")
        _require(1 <= high < math.inf, "correction_high", high, "must be 1 or more")
        if self.correction.startswith("token") and self.ratio_level.startswith(
            ("document", "segment")
        ):
            raise InputError(
                f"loss.correction is {self.correction!r}, which weighs tokens, but {type(self).__name__} has one term "
                f"for each {self.ratio_level}: set it to sequence_geometric, or name gspo.losses.GSPOTokenLoss."
            )
        return partial(F.CORRECTIONS[self.correction], low=low, high=high)

    def _ratio(self) -> F.RatioLevel:
        raise NotImplementedError

    def _surrogate(self) -> F.Surrogate:
        raise NotImplementedError

    def forward(
        self, logps: Tensor, entropy: Tensor, inputs: LossInputs
    ) -> tuple[Tensor, MetricSums]:
        """Undivided loss sum and metric sums of whole documents; ``logps`` and ``entropy`` are [T] in nats."""
        return self.objective(logps, entropy, inputs)

    def denominator(self, num_documents: int, num_label_tokens: int) -> float:
        """What the loss sum is divided by, from the totals of the optimizer step."""
        return self._denominator(num_documents, num_label_tokens)


@dataclass(kw_only=True, eq=False, repr=False)
class _ClippedLoss(_PolicyLoss):
    """With the clipped surrogate, dual if asked for.

    A width is that of the band around a ratio of 1, 0 or more, below it at most 1; null does not clip on that side.
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None

    def _surrogate(self) -> F.Surrogate:
        low, high = _width("clip_low", self.clip_low, 1.0), _width("clip_high", self.clip_high)
        if self.dual_clip is not None:
            _require(
                self.dual_clip > 1, "dual_clip", self.dual_clip, "must be above 1, or null for none"
            )
            return partial(
                F.dual_clipped_surrogate, clip_low=low, clip_high=high, dual_clip=self.dual_clip
            )
        if low == high == math.inf:
            return F.unclipped_surrogate
        return partial(F.clipped_surrogate, clip_low=low, clip_high=high)


@dataclass(kw_only=True, eq=False, repr=False)
class GSPOLoss(_ClippedLoss):
    """Group sequence policy optimization: one clipped ratio per document (arXiv 2507.18071, eq. 5 to 7).

    Args:
        clip_low: lower width of the band around 1, in [0, 1]; null for none. The paper's is 3e-4.
        clip_high: upper width, >= 0; null for none. The paper's is 4e-4.
        dual_clip: c > 1; where A < 0 the loss is at most ``-c A`` (arXiv 1912.09729). Null for none.
        length_exponent: g of the ratio ``exp(sum of log-ratios / N^g)``, in [0, 1]. 1 is the paper's, 0 the product of
            the ratios, whose ``log_ratio_bound`` wants to be as much larger.
    """

    ratio_level: ClassVar[str] = "document"

    clip_low: float | None = 3e-4
    clip_high: float | None = 4e-4
    length_exponent: float = 1.0

    def _ratio(self) -> F.RatioLevel:
        _require(
            0 <= self.length_exponent <= 1,
            "length_exponent",
            self.length_exponent,
            "must lie in [0, 1]",
        )
        return partial(
            F.document_ratio, bound=self.log_ratio_bound, length_exponent=self.length_exponent
        )


@dataclass(kw_only=True, eq=False, repr=False)
class GSPOTokenLoss(_ClippedLoss):
    """GSPO-token: a document's ratio with a gradient through each token (arXiv 2507.18071, eq. 13 and 14).

    With one advantage per document it is :class:`GSPOLoss`, in value and gradient; it takes one per token too.

    Args:
        clip_low: lower width of the band around 1, in [0, 1]; null for none.
        clip_high: upper width, >= 0; null for none.
        dual_clip: c > 1; where A < 0 the loss is at most ``-c A`` (arXiv 1912.09729). Null for none.
        bound_below: False lets ``log_ratio_bound`` cap large ratios only, as verl does.
    """

    ratio_level: ClassVar[str] = "GSPO-token"

    clip_low: float | None = 3e-4
    clip_high: float | None = 4e-4
    bound_below: bool = True

    def _ratio(self) -> F.RatioLevel:
        return partial(
            F.document_ratio_per_token, bound=self.log_ratio_bound, bound_below=self.bound_below
        )


@dataclass(kw_only=True, eq=False, repr=False)
class GRPOLoss(_ClippedLoss):
    """Group relative policy optimization: one clipped ratio per token (arXiv 2402.03300, eq. 3).

    ``aggregation: document`` is the mean over a document's tokens, then over documents; ``token`` is DAPO's (arXiv
    2503.14476), ``constant`` Dr. GRPO's (arXiv 2503.20783).

    Args:
        clip_low: lower width of the band around 1, in [0, 1]; null for none.
        clip_high: upper width, >= 0; null for none. Larger than ``clip_low`` is DAPO's clip-higher.
        dual_clip: c > 1; where A < 0 the loss is at most ``-c A`` (arXiv 1912.09729). Null for none.
    """

    ratio_level: ClassVar[str] = "token"

    def _ratio(self) -> F.RatioLevel:
        return partial(F.token_ratio, bound=self.log_ratio_bound)


@dataclass(kw_only=True, eq=False, repr=False)
class SegmentLoss(_ClippedLoss):
    """GSPO's ratio of each segment, a turn or a reasoning step; documents need a ``segment_index``.

    A document's weight is spread over its segments by their tokens. Segments may have advantages of their own.

    Args:
        clip_low: lower width of the band around 1, in [0, 1]; null for none. One between GSPO's and GRPO's.
        clip_high: upper width, >= 0; null for none.
        dual_clip: c > 1; where A < 0 the loss is at most ``-c A`` (arXiv 1912.09729). Null for none.
    """

    ratio_level: ClassVar[str] = "segment"

    clip_low: float | None = 3e-4
    clip_high: float | None = 4e-4

    def _ratio(self) -> F.RatioLevel:
        return partial(F.segment_ratio, bound=self.log_ratio_bound)


@dataclass(kw_only=True, eq=False, repr=False)
class MultiScaleLoss(_ClippedLoss):
    """A ratio between a token's and its document's, ``exp(a l_t + (1 - a) mean l)``, gradient through the token.

    Args:
        token_share: a in [0, 1]; 1 is :class:`GRPOLoss`, 0 is :class:`GSPOTokenLoss`.
        clip_low: lower width of the band around 1, in [0, 1]; null for none. The smaller a, the narrower.
        clip_high: upper width, >= 0; null for none.
        dual_clip: c > 1; where A < 0 the loss is at most ``-c A`` (arXiv 1912.09729). Null for none.
    """

    ratio_level: ClassVar[str] = "mix"

    token_share: float = 0.5

    def _ratio(self) -> F.RatioLevel:
        _require(0 <= self.token_share <= 1, "token_share", self.token_share, "must lie in [0, 1]")
        return partial(F.mixed_ratio, token_share=self.token_share, bound=self.log_ratio_bound)


@dataclass(kw_only=True, eq=False, repr=False)
class CISPOLoss(_PolicyLoss):
    """CISPO: the truncated token ratio is a stopped weight on the log-probability (arXiv 2506.13585, eq. 4 and 5).

    No token's gradient vanishes, so ``clip/binding_*`` stay 0.

    Args:
        clip_low: the weight is at least 1 minus this, in [0, 1]; null for no lower bound, as in the paper.
        clip_high: the weight is at most 1 plus this, >= 0; null for none. Some tools give the cap itself instead.
    """

    ratio_level: ClassVar[str] = "token"
    surrogate_name: ClassVar[str] = "CISPO"

    aggregation: str = "token"
    clip_low: float | None = None
    clip_high: float | None = 5.0

    def _ratio(self) -> F.RatioLevel:
        return partial(F.token_ratio, bound=self.log_ratio_bound)

    def _surrogate(self) -> F.Surrogate:
        low, high = _width("clip_low", self.clip_low, 1.0), _width("clip_high", self.clip_high)
        return partial(F.cispo_surrogate, clip_low=low, clip_high=high)


@dataclass(kw_only=True, eq=False, repr=False)
class FSPOLoss(_PolicyLoss):
    """FSPO: the product of a document's ratios, in a band whose log grows as sqrt(N) (arXiv 2509.09177).

    At a ratio of 1 a document's gradient is N times that of :class:`GSPOLoss`. The drift term of the paper's first
    version is not here.

    Args:
        clip_low: the log of the ratio is clipped at minus this times sqrt(N), nats, >= 0; null for none.
        clip_high: and at this times sqrt(N); null for none.
    """

    ratio_level: ClassVar[str] = "document, product"
    surrogate_name: ClassVar[str] = "length-fair"

    log_ratio_bound: float = 40.0  # of a sum; the band of 0.2 reaches 10 at 2,500 tokens
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2

    def _ratio(self) -> F.RatioLevel:
        return partial(F.document_ratio, bound=self.log_ratio_bound, length_exponent=0.0)

    def _surrogate(self) -> F.Surrogate:
        low, high = _width("clip_low", self.clip_low), _width("clip_high", self.clip_high)
        return partial(F.length_fair_surrogate, clip_low=low, clip_high=high)


def _width(key: str, value: float | None, largest: float = math.inf) -> float:
    """Infinite where there is none."""
    if value is None:
        return math.inf
    must = (
        "must not be negative"
        if largest == math.inf
        else f"must lie in [0, {largest:g}], or be null"
    )
    _require(0 <= value <= largest, key, value, must)
    return value


def _one_of(key: str, value: str, choices: dict) -> None:
    _require(
        isinstance(value, str) and value in choices,
        key,
        repr(value),
        f"must be one of {', '.join(choices)}",
    )


def _require(condition: bool, key: str, value: object, must: str) -> None:
    if not condition:
        raise InputError(f"loss.{key} is {value}: it {must}.")
