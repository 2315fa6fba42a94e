"""Loss components: what a config names under ``loss._component_``.

Each is a named composition of the pure functions in :mod:`gspo.losses.functional`, without
parameters of its own. A loss takes log-probabilities, not logits, and returns undivided sums; the
recipe divides by the counts of the optimizer step. ``python -m gspo presets`` lists what other
tools and papers mean by them.

All of them take:

- ``clip_low`` and ``clip_high``: widths of the clip range, as each loss says; null does not clip on
  that side.
- ``aggregation``: ``document`` (every document weighs 1, over documents), ``token`` (a document
  weighs its tokens, over tokens), ``token_over_documents`` (its tokens, over documents),
  ``constant`` (its tokens, over documents times ``constant_length``) or ``token_over_batch_size``
  (its tokens, over ``batch_size``).
- ``normalize_by_documents``: turns ``token`` into ``token_over_documents``.
- ``constant_length``: tokens, for ``constant``. ``batch_size``: documents, for
  ``token_over_batch_size``.
- ``log_ratio_bound``: nats; the exponent of a ratio is clamped to plus and minus this before
  ``exp``.
- ``kl_coef``: weight of the KL to the reference policy, 0 = none. Needs a reference policy in the
  config.
- ``kl_estimator``: ``k1``, ``k2`` or ``k3``.
- ``entropy_coef``: weight of the entropy bonus, 0 = none.
- ``correction``: with ``old_logps: recompute``, the importance weight from the sampler's
  log-probabilities to these: ``token_tis`` (a token's ratio, at most ``correction_high``),
  ``token_mask`` (a token's ratio, 0 outside ``correction_low`` to ``correction_high``),
  ``sequence_product`` or ``sequence_geometric`` (the document's, at most ``correction_high``); null
  for none. The first two need a loss with a term per token.

For a value outside these they raise an :class:`~gspo.errors.InputError` that names the argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from gspo.errors import InputError, require
from gspo.losses import functional as F
from gspo.losses.inputs import LossInputs, LossOutput, LossTraits
from gspo.types import Axis

# The argument that an aggregation divides by.
_DIVISORS = {"constant": "constant_length", "token_over_batch_size": "batch_size"}


@dataclass(kw_only=True, eq=False, repr=False)
class _PolicyLoss(nn.Module):
    """The arguments that every objective has, their checks, and the composition."""

    ratio_unit: ClassVar[Axis]  # what has one ratio
    ratio_level: ClassVar[str]  # a label, as surrogate_name, shown in tables
    surrogate_name: ClassVar[str] = "clipped"

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
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
        self._check_shared_arguments()
        if self.normalize_by_documents and self.aggregation == "token":
            self.aggregation = "token_over_documents"
        aggregation = F.AGGREGATIONS[self.aggregation]
        self._denominator = partial(aggregation.denominator, **self._divisor())
        self.objective = partial(
            F.policy_objective,
            ratio=self._ratio(),
            surrogate=self._surrogate(),
            weights=aggregation.weights,
            kl_coef=self.kl_coef,
            kl=F.KL_ESTIMATORS[self.kl_estimator],
            entropy_coef=self.entropy_coef,
            correction=self._correction(),
        )
        self.traits = LossTraits(
            ratio_unit=self.ratio_unit,
            entropy_grad=self.entropy_coef > 0,
            has_clip_range=self.clip_low is not None or self.clip_high is not None,
            needs=self._needs(),
        )

    def _check_types(self) -> None:
        for field in fields(self):
            kinds = str(field.type).split(" | ")
            value = getattr(self, field.name)
            _check_type(field.name, value, kinds)

    def _check_shared_arguments(self) -> None:
        _check_choice("aggregation", self.aggregation, F.AGGREGATIONS)
        _check_choice("kl_estimator", self.kl_estimator, F.KL_ESTIMATORS)
        for key in ("kl_coef", "entropy_coef"):
            value = getattr(self, key)
            require(value >= 0, key, value, "must be 0 or more")
        bound = self.log_ratio_bound
        require(bound > 0, "log_ratio_bound", bound, "must be positive")
        if self.normalize_by_documents and self.aggregation in _DIVISORS:
            must = f"contradicts aggregation {self.aggregation!r}"
            raise InputError("normalize_by_documents", True, must, "drop one of them")

    def _divisor(self) -> dict[str, int]:
        """Return what the denominator needs beside the step's counts."""
        key = _DIVISORS.get(self.aggregation)
        if key is None:
            return {}
        value = getattr(self, key)
        if value is None:
            must = f"divides by {key}, which is null"
            remedy = f"set {key}"
            raise InputError("aggregation", self.aggregation, must, remedy)
        require(value > 0, key, value, "must be positive")
        return {key: value}

    def _correction(self) -> F.Correction | None:
        if self.correction is None:
            return None
        _check_choice("correction", self.correction, F.CORRECTIONS)
        low = self.correction_low
        high = self.correction_high
        require(0 <= low <= 1, "correction_low", low, "must lie in [0, 1]")
        require(high >= 1, "correction_high", high, "must be 1 or more")
        weighs_tokens = self.correction in F.TOKEN_CORRECTIONS
        has_token_terms = self.ratio_unit == Axis.SLOT
        require(
            not weighs_tokens or has_token_terms,
            "correction",
            self.correction,
            f"weighs tokens, but the terms of {type(self).__name__} are {self.ratio_unit}",
            "set it to sequence_geometric, or name gspo.losses.GSPOTokenLoss",
        )
        correction = F.CORRECTIONS[self.correction]
        return partial(correction, low=low, high=high)

    def _needs(self) -> dict[str, str]:
        """Return the inputs that the options which are on need, by option."""
        needs = {}
        if self.kl_coef > 0:
            needs["kl_coef"] = "ref_logps"
        if self.correction is not None:
            needs["correction"] = "sampler_logps"
        if self.entropy_coef > 0:
            needs["entropy_coef"] = "entropies"
        return needs

    def _ratio(self) -> F.RatioLevel:
        raise NotImplementedError

    def _surrogate(self) -> F.Surrogate:
        raise NotImplementedError

    def forward(self, logps: Tensor, entropy: Tensor, inputs: LossInputs) -> LossOutput:
        """Return the undivided loss sum of whole documents; the first two are [T] in nats."""
        return self.objective(logps, entropy, inputs)

    def denominator(self, num_documents: int, num_label_tokens: int) -> float:
        """Return what the loss sum is divided by, from the totals of the optimizer step."""
        return self._denominator(num_documents, num_label_tokens)


@dataclass(kw_only=True, eq=False, repr=False)
class _ClippedLoss(_PolicyLoss):
    """Base of losses with PPO's clipped surrogate, optionally dual-clipped.

    The clip range lies around a ratio of 1. Its widths are 0 or more, the lower one at most 1.
    """

    dual_clip: float | None = None

    def _surrogate(self) -> F.Surrogate:
        low = _clip_width("clip_low", self.clip_low, 1.0)
        high = _clip_width("clip_high", self.clip_high)
        dual = self.dual_clip
        if dual is not None:
            require(dual > 1, "dual_clip", dual, "must be above 1, or null for none")
            return partial(F.dual_clipped_surrogate, clip_low=low, clip_high=high, dual_clip=dual)
        clips_nothing = low == high == math.inf
        if clips_nothing:
            return F.unclipped_surrogate
        return partial(F.clipped_surrogate, clip_low=low, clip_high=high)


@dataclass(kw_only=True, eq=False, repr=False)
class GSPOLoss(_ClippedLoss):
    """Group sequence policy optimization: one clipped ratio per document.

    From arXiv 2507.18071, eq. 5 to 7.

    Args:
        clip_low: lower width of the clip range around 1, in [0, 1]; null for none. The
            paper's is 3e-4.
        clip_high: upper width, >= 0; null for none. The paper's is 4e-4.
        dual_clip: c > 1; where A < 0 the loss is at most ``-c A`` (arXiv 1912.09729). Null for
            none.
        length_exponent: g of the ratio ``exp(sum of log-ratios / N^g)``, in [0, 1]. 1 is the
            paper's, 0 the product of the ratios, which needs a larger ``log_ratio_bound``.
    """

    ratio_unit: ClassVar[Axis] = Axis.DOCUMENT
    ratio_level: ClassVar[str] = "document"

    clip_low: float | None = 3e-4
    clip_high: float | None = 4e-4
    length_exponent: float = 1.0

    def _ratio(self) -> F.RatioLevel:
        exponent = self.length_exponent
        require(0 <= exponent <= 1, "length_exponent", exponent, "must lie in [0, 1]")
        return partial(F.document_ratio, bound=self.log_ratio_bound, length_exponent=exponent)


@dataclass(kw_only=True, eq=False, repr=False)
class GSPOTokenLoss(_ClippedLoss):
    """GSPO-token: a document's ratio with a gradient through each token.

    From arXiv 2507.18071, eq. 13 and 14. With one advantage per document it is :class:`GSPOLoss`,
    in value and gradient; it takes one per token too.

    Args:
        clip_low: lower width of the clip range around 1, in [0, 1]; null for none.
        clip_high: upper width, >= 0; null for none.
        dual_clip: c > 1; where A < 0 the loss is at most ``-c A`` (arXiv 1912.09729). Null for
            none.
        bound_below: False lets ``log_ratio_bound`` cap large ratios only, as verl does.
    """

    ratio_unit: ClassVar[Axis] = Axis.SLOT
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

    ``aggregation: document`` is the mean over a document's tokens, then over documents; ``token``
    is DAPO's (arXiv 2503.14476), ``constant`` Dr. GRPO's (arXiv 2503.20783).

    Args:
        clip_low: lower width of the clip range around 1, in [0, 1]; null for none.
        clip_high: upper width, >= 0; null for none. Larger than ``clip_low`` is DAPO's clip-higher.
        dual_clip: c > 1; where A < 0 the loss is at most ``-c A`` (arXiv 1912.09729). Null for
            none.
    """

    ratio_unit: ClassVar[Axis] = Axis.SLOT
    ratio_level: ClassVar[str] = "token"

    def _ratio(self) -> F.RatioLevel:
        return partial(F.token_ratio, bound=self.log_ratio_bound)


@dataclass(kw_only=True, eq=False, repr=False)
class SegmentLoss(_ClippedLoss):
    """GSPO with a ratio per segment: a turn or a reasoning step.

    Batches need a ``segment_index``. A document's weight is spread over its segments by their
    tokens. Segments may have advantages of their own.

    Args:
        clip_low: lower width of the clip range around 1, in [0, 1]; null for none. One
            between GSPO's and GRPO's.
        clip_high: upper width, >= 0; null for none.
        dual_clip: c > 1; where A < 0 the loss is at most ``-c A`` (arXiv 1912.09729). Null for
            none.
    """

    ratio_unit: ClassVar[Axis] = Axis.SEGMENT
    ratio_level: ClassVar[str] = "segment"

    clip_low: float | None = 3e-4
    clip_high: float | None = 4e-4

    def _ratio(self) -> F.RatioLevel:
        return partial(F.segment_ratio, bound=self.log_ratio_bound)


@dataclass(kw_only=True, eq=False, repr=False)
class MultiScaleLoss(_ClippedLoss):
    """A ratio between a token's and its document's: ``exp(a l_t + (1 - a) mean l)``.

    The gradient goes through the token.

    Args:
        token_share: a in [0, 1]; 1 is :class:`GRPOLoss`, 0 is :class:`GSPOTokenLoss`.
        clip_low: lower width of the clip range around 1, in [0, 1]; null for none. The
            smaller a, the narrower.
        clip_high: upper width, >= 0; null for none.
        dual_clip: c > 1; where A < 0 the loss is at most ``-c A`` (arXiv 1912.09729). Null for
            none.
    """

    ratio_unit: ClassVar[Axis] = Axis.SLOT
    ratio_level: ClassVar[str] = "mix"

    token_share: float = 0.5

    def _ratio(self) -> F.RatioLevel:
        share = self.token_share
        require(0 <= share <= 1, "token_share", share, "must lie in [0, 1]")
        return partial(F.mixed_ratio, token_share=share, bound=self.log_ratio_bound)


@dataclass(kw_only=True, eq=False, repr=False)
class CISPOLoss(_PolicyLoss):
    """CISPO: the truncated token ratio is a stopped weight on the log-probability.

    From arXiv 2506.13585, eq. 4 and 5. No token's gradient vanishes, so ``clip/binding_*`` stay 0.

    Args:
        clip_low: the weight is at least 1 minus this, in [0, 1]; null for no lower bound, as in the
            paper.
        clip_high: the weight is at most 1 plus this, >= 0; null for none. Some tools give the cap
            itself instead.
    """

    ratio_unit: ClassVar[Axis] = Axis.SLOT
    ratio_level: ClassVar[str] = "token"
    surrogate_name: ClassVar[str] = "CISPO"

    aggregation: str = "token"
    clip_low: float | None = None
    clip_high: float | None = 5.0

    def _ratio(self) -> F.RatioLevel:
        return partial(F.token_ratio, bound=self.log_ratio_bound)

    def _surrogate(self) -> F.Surrogate:
        low = _clip_width("clip_low", self.clip_low, 1.0)
        high = _clip_width("clip_high", self.clip_high)
        return partial(F.cispo_surrogate, clip_low=low, clip_high=high)


@dataclass(kw_only=True, eq=False, repr=False)
class FSPOLoss(_PolicyLoss):
    """FSPO: the product of a document's ratios, clipped in a range whose log grows as sqrt(N).

    From arXiv 2509.09177. At a ratio of 1 a document's gradient is N times that of
    :class:`GSPOLoss`. The drift term of the paper's first version is not here.

    Args:
        clip_low: the log of the ratio is clipped at minus this times sqrt(N), nats, >= 0; null for
            none.
        clip_high: and at this times sqrt(N); null for none.
    """

    ratio_unit: ClassVar[Axis] = Axis.DOCUMENT
    ratio_level: ClassVar[str] = "document, product"
    surrogate_name: ClassVar[str] = "length-fair"

    log_ratio_bound: float = 40.0  # of a sum; a width of 0.2 reaches 10 at 2,500 tokens
    clip_low: float | None = 0.2
    clip_high: float | None = 0.2

    def _ratio(self) -> F.RatioLevel:
        return partial(F.document_ratio, bound=self.log_ratio_bound, length_exponent=0.0)

    def _surrogate(self) -> F.Surrogate:
        low = _clip_width("clip_low", self.clip_low)
        high = _clip_width("clip_high", self.clip_high)
        return partial(F.length_fair_surrogate, clip_low=low, clip_high=high)


_MAX_FLOAT32 = 3.4e38  # objectives are float32, in which a larger number is infinite
_MAX_WHOLE = 2**63 - 1  # more is beyond what tensors hold, and far more beyond any float


def _check_type(key: str, value: Any, kinds: list[str]) -> None:
    """Refuse a value of a wrong type.

    YAML and the command line give whatever was typed: a text is true, true is 1, .inf a number.
    """
    is_optional = "None" in kinds
    if "bool" in kinds:
        require(isinstance(value, bool), key, value, "must be true or false")
        return
    if "str" in kinds or (value is None and is_optional):
        return
    is_number = type(value) is int and abs(value) <= _MAX_WHOLE
    if type(value) is float:
        takes_float = "float" in kinds
        is_number = takes_float and abs(value) <= _MAX_FLOAT32
    whole = " whole" if "int" in kinds else ""
    ending = ", or null" if is_optional else ""
    remedy = f"give one up to {_MAX_FLOAT32:g}" if type(value) is float else ""
    require(is_number, key, value, f"must be a finite{whole} number{ending}", remedy)


def _check_choice(key: str, value: Any, choices: Iterable[str]) -> None:
    is_known = isinstance(value, str) and value in choices
    names = ", ".join(choices)
    require(is_known, key, value, f"must be one of {names}")


def _clip_width(key: str, value: float | None, largest: float = math.inf) -> float:
    """Return a width of the clip range, infinite where there is none."""
    if value is None:
        return math.inf
    must = "must not be negative"
    if largest < math.inf:
        must = f"must lie in [0, {largest:g}], or be null"
    require(0 <= value <= largest, key, value, must)
    return value
