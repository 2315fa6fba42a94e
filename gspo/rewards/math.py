"""Verification of mathematical answers, through the math-verify library."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from math_verify import parse, verify

from gspo.rewards.text import extract_answer

# The pool has a time limit of its own on the same signal, so the library's are off; it would warn of that per worker.
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
    r"""1 where the completion's final expression equals the reference mathematically, else 0.

    Args:
        prompt: not used.
        completion: the sampled text; the answer is looked for in LaTeX (``\boxed`` first) and in plain expressions.
        answer: the reference, as LaTeX with or without its dollar signs, or as a worked answer that holds LaTeX.
        metadata: not used.
        answer_marker: what stands before the answer in a worked reference, e.g. ``"####"`` in GSM8K's.
        float_rounding: decimals that two floats must share.
        strict: variables must have the same names, and a set is not a tuple.

    Raises:
        ValueError: there is no reference answer, or no marker or no expression in it.
    """
    if answer is None:
        raise ValueError("math_verify needs an answer; set the reader's answer_column")
    reference = answer if answer_marker is None else extract_answer(answer, marker=answer_marker)
    if reference is None:
        raise ValueError(
            f"math_verify finds no answer_marker {answer_marker!r} in the reference {answer[-80:]!r}"
        )
    gold = _parse_gold(reference)
    if not gold:
        raise ValueError(
            f"math_verify finds no expression in the reference answer {reference[:80]!r}"
        )
    given = parse(completion, parsing_timeout=None)
    return float(
        verify(gold, given, float_rounding=float_rounding, strict=strict, timeout_seconds=None)
    )


@functools.lru_cache(maxsize=1024)  # the completions of a group share their reference
def _parse_gold(answer: str) -> list[Any]:
    text = answer if any(mark in answer for mark in _MATH_MARKS) else f"${answer}$"
    return parse(text, parsing_timeout=None)
