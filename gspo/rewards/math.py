"""Verification of mathematical answers, through the math-verify library."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from math_verify import parse, verify

from gspo.rewards.options import require_mark, require_switch, require_whole
from gspo.rewards.text import extract_answer

# The pool has a time limit of its own on the same signal, so the library's are off; it would warn
# of that in every worker.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_MATH_MARKS = ("$", "\\(", "\\[", "\\boxed", "\\begin")


def math_verify(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    answer_marker: str | None = None,
    float_rounding: int = 6,
    strict: bool = True,
) -> float:
    r"""Return 1 where the completion's last expression equals the reference mathematically, else 0.

    Args:
        prompt: not used.
        completion: the sampled text; the answer is looked for in LaTeX (``\boxed`` first) and in
            plain expressions.
        answer: the reference, as LaTeX with or without its dollar signs, or as a worked answer
            that holds LaTeX.
        metadata: not used.
        answer_marker: what stands before the answer in a worked reference, e.g. ``"####"`` in
            GSM8K's.
        float_rounding: decimals that two floats must share.
        strict: variables must have the same names, and a set is not a tuple.

    Raises:
        ValueError: There is no reference answer, or no marker or no expression in it.
    """
    if answer is None:
        raise ValueError("math_verify needs an answer; set the reader's answer_column")
    gold = _parse_gold(_reference_of(answer, answer_marker))
    stated = parse(completion, parsing_timeout=None)
    is_equal = verify(
        gold, stated, float_rounding=float_rounding, strict=strict, timeout_seconds=None
    )
    return float(is_equal)


def _check_options(
    *, answer_marker: str | None = None, float_rounding: int = 6, strict: bool = True
) -> None:
    require_mark("answer_marker", answer_marker)
    require_whole("float_rounding", float_rounding, least=0)
    require_switch("strict", strict)


math_verify.check_options = _check_options  # type: ignore[attr-defined]


def _reference_of(answer: str, marker: str | None) -> str:
    if marker is None:
        return answer
    reference = extract_answer(answer, marker=marker)
    if reference is None:
        raise ValueError(
            f"math_verify finds no answer_marker {marker!r} in the reference {answer[-80:]!r}"
        )
    return reference


@functools.lru_cache(maxsize=1024)  # the completions of a group share their reference
def _parse_gold(reference: str) -> list[Any]:
    has_marks = any(mark in reference for mark in _MATH_MARKS)
    gold = parse(reference if has_marks else f"${reference}$", parsing_timeout=None)
    if not gold:
        raise ValueError(
            f"math_verify finds no expression in the reference answer {reference[:80]!r}"
        )
    return gold
