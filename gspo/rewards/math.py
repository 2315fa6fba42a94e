"""Verification of mathematical answers, through the math-verify library."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from math_verify import parse, verify
from sympy import Basic, Eq, MatrixBase, Number, Symbol

from gspo.rewards.extraction import find_answers
from gspo.rewards.options import (
    check_extraction,
    is_cut,
    require_mark,
    require_switch,
    require_truncated,
    require_whole,
)
from gspo.rewards.restating import is_part_of
from gspo.rewards.text import extract_answer
from gspo.rewards.values import is_evaluated, reads_as_number, reads_as_value, squeeze, tidy

# The pool has a time limit of its own on the same signal, so the library's are off; it would warn
# of that in every worker.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_MATH_MARKS = ("$", "\\(", "\\[", "\\boxed", "\\begin")
_EQUALS = re.compile(r"(?<![<>!\\:])=")


def math_verify(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    extraction: str = "final",
    marker: str | None = None,
    truncated: str = "zero",
    answer_marker: str | None = None,
    float_rounding: int = 6,
    strict: bool = True,
) -> float:
    r"""Return 1 where the completion's final answer equals the reference mathematically, else 0.

    The answer has to be a value: ``\boxed{58+17}`` earns nothing where 75 is asked for, and neither
    does a part of the prompt, unless it is the reference as it stands. Where a completion states
    several answers, each must be right.

    Args:
        prompt: the task, which an answer must not say again.
        completion: the sampled text.
        answer: the reference, as LaTeX with or without its dollar signs, or as a worked answer
            that holds LaTeX.
        metadata: ``finish_reason``, which :class:`gspo.data.score.Score` adds; without it the
            completion counts as finished.
        extraction: where the final answer stands, see :data:`gspo.rewards.extraction.RULES`.
            ``final``, the default, is ``\boxed{}``; without one, the last formula or number.
            ``anywhere`` leaves the search to math-verify and asks for no value, which can be gamed.
        marker: what stands before the answer, with ``extraction: after_marker``.
        truncated: ``zero``, or ``score`` to score completions that were cut, too.
        answer_marker: what stands before the answer in a worked reference, e.g. ``"####"`` in
            GSM8K's.
        float_rounding: decimals that two floats must share.
        strict: variables must have the same names, and a set is not a tuple.

    Raises:
        ValueError: There is no reference answer, or no marker or no expression in it.
    """
    if answer is None:
        raise ValueError("math_verify needs an answer; set the reader's answer_column")
    reference = _reference_of(answer, answer_marker)
    gold = _parse_gold(reference)
    if is_cut(metadata, truncated):
        return 0.0

    def equals(stated: list[Any]) -> bool:
        return verify(
            gold, stated, float_rounding=float_rounding, strict=strict, timeout_seconds=None
        )

    if extraction == "anywhere":
        return float(equals(parse(completion, parsing_timeout=None)))
    answers = find_answers(completion, extraction, marker=marker, prompt=prompt)
    if not answers or _says_prompt_again(prompt, completion, answers[0]):
        return 0.0
    are_right = all(_is_right(text, prompt, reference, gold, equals) for text in answers)
    return float(are_right)


def _check_options(
    *,
    extraction: str = "final",
    marker: str | None = None,
    truncated: str = "zero",
    answer_marker: str | None = None,
    float_rounding: int = 6,
    strict: bool = True,
) -> None:
    check_extraction(extraction, marker)
    require_truncated(truncated)
    require_mark("answer_marker", answer_marker)
    require_whole("float_rounding", float_rounding, least=0)
    require_switch("strict", strict)


math_verify.check_options = _check_options  # type: ignore[attr-defined]


def _says_prompt_again(prompt: str, completion: str, answer: str) -> bool:
    """Whether a completion is nothing but a piece of the prompt, and more than its answer."""
    is_answer_alone = squeeze(tidy(completion)) == squeeze(tidy(answer))
    return not is_answer_alone and is_part_of(prompt, completion)


def _is_right(
    text: str,
    prompt: str,
    reference: str,
    gold: list[Any],
    equals: Callable[[list[Any]], bool],
) -> bool:
    """Whether a stated answer is a value and equals the reference."""
    stated = tidy(text)
    if not stated:
        return False
    if squeeze(stated) == squeeze(tidy(reference)):
        return True
    *names, value = _sides(stated, gold)
    are_names = all(_is_name(name) or equals(_parse_stated(name)) for name in names)
    if not are_names or not reads_as_value(value):
        return False
    expressions = _parse_stated(value)
    form = expressions[0] if expressions else None
    if isinstance(form, Number) and not reads_as_number(value):
        return False
    if isinstance(form, Basic | MatrixBase) and form != gold[0]:
        if _restates(prompt, value) or not is_evaluated(form):
            return False
    return equals(expressions)


def _sides(stated: str, gold: list[Any]) -> list[str]:
    """Return the sides of an equation, of which the last is the value: ``x = 3``, ``1 + 2 = 3``.

    An answer stays whole where the reference is an equation, or where it has several parts.
    """
    is_curve = isinstance(gold[0], Eq) and not isinstance(gold[0].lhs, Symbol)
    has_parts = "," in stated or re.search(r"\b(?:or|and)\b", stated) is not None
    if is_curve or has_parts:
        return [stated]
    sides = [side.strip() for side in _EQUALS.split(stated)]
    if isinstance(gold[0], Eq) and sides[-1] == str(gold[0].lhs):  # 2x + 3 = y
        sides.reverse()
    return sides if sides[-1] else [stated]


def _is_name(side: str) -> bool:
    """Whether a side of an equation says what the value is of."""
    return re.search(r"[^\W\d_]", re.sub(r"\\[A-Za-z]+", "", side)) is not None


def _restates(prompt: str, value: str) -> bool:
    """Whether a value that is more than a number or a name stands in the prompt as it is."""
    is_plain = re.fullmatch(r"[-+]?[\w.,]+|-?\\?[dt]?frac\{\d+\}\{\d+\}|-?\d+/\d+", value)
    if is_plain:
        return False
    return squeeze(value) in squeeze(prompt)


def _parse_stated(value: str) -> list[Any]:
    return parse(f"\\boxed{{{value}}}", parsing_timeout=None)


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
    if not reference.strip():
        raise ValueError("math_verify is given an empty reference answer; leave the row out")
    has_marks = any(mark in reference for mark in _MATH_MARKS)
    gold = parse(reference, parsing_timeout=None) if has_marks else []
    gold = gold or parse(f"${reference}$", parsing_timeout=None)
    if not gold:
        raise ValueError(
            f"math_verify finds no expression in the reference answer {reference[:80]!r}"
        )
    return gold
