"""The results of a loss of the user's own, checked, so that nonsense is refused by its name.

Nothing here waits for a device: shapes and types are looked at, and no values.

Not here: the interface itself (:mod:`gspo.losses.inputs`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from gspo.errors import InputError, show
from gspo.losses.inputs import Loss, LossInputs, LossOutput, traits_of
from gspo.metrics import Metric, NotFinite

_RETURN = "return (loss, {name: (value, weight)})"


class CheckedLoss(nn.Module):
    """A loss that refuses what another one returns, if it is no :class:`LossOutput`.

    Args:
        inner: the other one.
    """

    def __init__(self, inner: Loss) -> None:
        super().__init__()
        self.inner = inner
        self.traits = traits_of(inner)

    def forward(self, logps: Tensor, entropy: Tensor, inputs: LossInputs) -> LossOutput:
        """Return the inner loss's output."""
        output = self.inner(logps, entropy, inputs)
        return checked_output(self.inner, output, needs_gradient=logps.requires_grad)

    def denominator(self, num_documents: int, num_label_tokens: int) -> float:
        """Return the inner loss's denominator."""
        return self.inner.denominator(num_documents, num_label_tokens)


def name_of(loss: Any) -> str:
    """Return the name of a loss's class."""
    inner = loss.inner if isinstance(loss, CheckedLoss) else loss
    return type(inner).__name__


def checked_output(loss: Any, output: Any, *, needs_gradient: bool) -> LossOutput:
    """Return what a loss has returned as a :class:`LossOutput`.

    Args:
        loss: that returned it, for the message.
        output: what it returned.
        needs_gradient: the log-probabilities that it was called with have one.

    Raises:
        InputError: It is something else.
    """
    is_output = isinstance(output, tuple | list) and len(output) in (2, 3)
    _require(is_output, loss, "a loss and its metrics", output)
    total, metrics, *_ = result = LossOutput(*output)
    is_scalar = isinstance(total, Tensor) and total.numel() == 1
    _require(is_scalar, loss, "one loss sum, a tensor of one element", total)
    is_attached = total.requires_grad or not needs_gradient
    _require(is_attached, loss, "a loss with a gradient by logps", total)
    _require(isinstance(metrics, Mapping), loss, "its metrics as a mapping", metrics)
    for name, metric in metrics.items():
        is_name = isinstance(name, str) and name.strip() != "" and name.isprintable()
        _require(is_name, loss, "metrics by names of printable text", name)
        must = f"the metric {name!r} as a pair of numbers, value and weight"
        _require(_is_metric(metric), loss, must, metric)
    is_count = result.not_finite is None or isinstance(result.not_finite, NotFinite)
    _require(is_count, loss, "a NotFinite or None as its third result", result.not_finite)
    return result


def denominator_of(loss: Any, num_documents: int, num_label_tokens: int) -> float:
    """Return what a loss sum is divided by; 1 when nothing is left.

    Raises:
        InputError: The loss states no number above 0 for tokens that are trained on.
    """
    stated: Any = loss.denominator(num_documents, num_label_tokens)
    number = float(stated) if _is_number(stated) else math.nan
    if 0 < number < math.inf:
        return number
    if num_label_tokens > 0:
        must = f"must have a denominator above 0 for {num_label_tokens} tokens, and gave "
        must += show(stated, 80)
        raise InputError("loss", name_of(loss), must, "correct its denominator")
    return 1.0


def _is_metric(value: Any) -> bool:
    if isinstance(value, Metric):
        return _is_number(value.value) and _is_number(value.weight)
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    return is_pair and _is_number(value[0]) and _is_number(value[1])


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float holds, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    if not isinstance(value, Real):
        return False
    try:
        float(value)
    except OverflowError:  # an integer of more than 308 digits
        return False
    return True


def _require(condition: bool, loss: Any, must: str, instead: Any) -> None:
    if not condition:
        problem = f"must return {must}, and gave {show(instead, 80)}"
        raise InputError("loss", type(loss).__name__, problem, _RETURN)
