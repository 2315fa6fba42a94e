"""Rewards that compare or match text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gspo.rewards.extraction import final_answer, has_empty_element, without_thinking
from gspo.rewards.options import (
    check_place,
    is_cut,
    require_pattern,
    require_switch,
    require_text,
    require_truncated,
)
from gspo.rewards.restating import is_part_of


def extract_answer(text: str, *, marker: str | None = None, last_line: bool = False) -> str | None:
    """Return the part of ``text`` that states the answer, stripped; None without the marker.

    Args:
        text: a completion, or a worked answer in the same form.
        marker: take what follows its last occurrence, to the end of that line, e.g. ``"####"``.
        last_line: take the last line that is not blank.
    """
    if marker is not None:
        _, separator, behind = text.rpartition(marker)
        if not separator:
            return None
        line, _, _ = behind.lstrip().partition("\n")
        return line.strip()
    if last_line:
        _, _, text = text.rstrip().rpartition("\n")
    return text.strip()


def stated_answer(
    prompt: str,
    completion: str,
    *,
    extraction: str | None = None,
    marker: str | None = None,
    last_line: bool = False,
) -> str | None:
    """Return a completion's final answer; None where there is none, or more than one.

    Without an extraction and a marker it is the whole completion, or its last line, less what is
    inside ``<think>``.

    Args:
        prompt: tells whether the completion begins inside ``<think>``.
        completion: the sampled text.
        extraction: a name in :data:`gspo.rewards.extraction.RULES`.
        marker: stands before the answer; with it the extraction is ``after_marker``.
        last_line: take the last line that is not blank.
    """
    if marker is not None:
        extraction = "after_marker"
    if extraction is not None:
        return final_answer(completion, extraction, marker=marker, prompt=prompt)
    text = without_thinking(completion, prompt)
    return extract_answer(text, last_line=last_line) or None


def exact_match(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    extraction: str | None = None,
    marker: str | None = None,
    last_line: bool = False,
    truncated: str = "zero",
    ignore: str = "",
    ignore_case: bool = False,
) -> float:
    """Return 1 where the completion's final answer is the reference answer, else 0.

    Args:
        prompt: tells whether the completion begins inside ``<think>``.
        completion: the sampled text.
        answer: the reference; where it holds the marker itself (GSM8K's worked answers do), what
            follows it.
        metadata: ``finish_reason``, which :class:`gspo.data.score.Score` adds; without it the
            completion counts as finished.
        extraction: see :func:`stated_answer`; ``anywhere`` looks for the reference's words anywhere
            in the completion, which can be gamed.
        marker: see :func:`stated_answer`; a completion without it gets 0.
        last_line: see :func:`stated_answer`.
        truncated: ``zero``, or ``score`` to score completions that were cut, too.
        ignore: characters dropped from both sides before they are compared, e.g. ``",$"``.
        ignore_case: compare without regard to case.

    Raises:
        ValueError: There is no reference answer, or it is empty.
    """
    if answer is None:
        raise ValueError("exact_match needs an answer; set the reader's answer_column")
    reference = _reference_of(answer, extraction, marker)
    right = _normalise(reference, ignore, ignore_case).strip()
    if not right:
        raise ValueError("exact_match is given an empty reference answer; leave the row out")
    if is_cut(metadata, truncated):
        return 0.0
    stated = stated_answer(
        prompt, completion, extraction=extraction, marker=marker, last_line=last_line
    )
    if stated is None:
        return 0.0
    left = _normalise(stated, ignore, ignore_case).strip()
    if extraction == "anywhere":
        return float(is_part_of(left, right))
    return float(left == right)


def _reference_of(answer: str, extraction: str | None, marker: str | None) -> str:
    """Return the reference in the form in which a completion's answer is compared with it."""
    worked = None
    if marker is not None:
        worked = extract_answer(answer, marker=marker)
    elif extraction not in (None, "anywhere"):
        worked = final_answer(answer, extraction)
    return answer.strip() if worked is None else worked


def _normalise(text: str, ignore: str, ignore_case: bool) -> str:
    for character in ignore:
        text = text.replace(character, "")
    return text.casefold() if ignore_case else text


def _check_exact_match(
    *,
    extraction: str | None = None,
    marker: str | None = None,
    last_line: bool = False,
    truncated: str = "zero",
    ignore: str = "",
    ignore_case: bool = False,
) -> None:
    check_place(extraction, marker, last_line)
    require_truncated(truncated)
    require_text("ignore", ignore)
    require_switch("ignore_case", ignore_case)


exact_match.check_options = _check_exact_match  # type: ignore[attr-defined]


def regex_match(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    pattern: str,
    whole: bool = True,
    truncated: str = "zero",
    empty_elements: bool = False,
) -> float:
    r"""Return 1 where the completion has a form, else 0.

    Such a form is ``<think>.+</think>\s*<answer>.+</answer>``.

    Args:
        prompt: not used.
        completion: the sampled text.
        answer: not used.
        metadata: ``finish_reason``, which :class:`gspo.data.score.Score` adds; without it the
            completion counts as finished.
        pattern: a Python regular expression; ``.`` matches a newline too.
        whole: the pattern must match the whole completion, less white space at both ends; else a
            part is enough.
        truncated: ``zero``, or ``score`` to score completions that were cut, too.
        empty_elements: whether a completion with an empty ``<think></think>`` can have the form.
    """
    if is_cut(metadata, truncated):
        return 0.0
    if not empty_elements and has_empty_element(completion):
        return 0.0
    matcher = re.compile(pattern, re.DOTALL)  # re keeps compiled patterns
    if whole:
        match = matcher.fullmatch(completion.strip())
    else:
        match = matcher.search(completion)
    return 0.0 if match is None else 1.0


def _check_regex_match(
    *,
    pattern: str,
    whole: bool = True,
    truncated: str = "zero",
    empty_elements: bool = False,
) -> None:
    require_pattern("pattern", pattern)
    require_switch("whole", whole)
    require_truncated(truncated)
    require_switch("empty_elements", empty_elements)


regex_match.check_options = _check_regex_match  # type: ignore[attr-defined]
