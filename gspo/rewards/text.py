"""Rewards that compare or match text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gspo.rewards.options import require_mark, require_pattern, require_switch, require_text


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


def exact_match(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    marker: str | None = None,
    last_line: bool = False,
    ignore: str = "",
    ignore_case: bool = False,
) -> float:
    """Return 1 where the completion's answer is the reference answer, else 0.

    Args:
        prompt: not used.
        completion: the sampled text.
        answer: the reference; where it holds the marker itself (GSM8K's worked answers do), what
            follows it.
        metadata: not used.
        marker: see :func:`extract_answer`; a completion without it gets 0.
        last_line: see :func:`extract_answer`.
        ignore: characters dropped from both sides before they are compared, e.g. ``",$"``.
        ignore_case: compare without regard to case.

    Raises:
        ValueError: There is no reference answer.
    """
    if answer is None:
        raise ValueError("exact_match needs an answer; set the reader's answer_column")
    stated = extract_answer(completion, marker=marker, last_line=last_line)
    if stated is None:
        return 0.0
    reference: str | None = answer.strip()
    if marker and marker in answer:
        reference = extract_answer(answer, marker=marker)
    left = _normalise(stated, ignore, ignore_case)
    right = _normalise(reference or "", ignore, ignore_case)
    return float(left == right)


def _normalise(text: str, ignore: str, ignore_case: bool) -> str:
    for character in ignore:
        text = text.replace(character, "")
    return text.casefold() if ignore_case else text


def _check_exact_match(
    *,
    marker: str | None = None,
    last_line: bool = False,
    ignore: str = "",
    ignore_case: bool = False,
) -> None:
    require_mark("marker", marker)
    require_switch("last_line", last_line)
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
) -> float:
    r"""Return 1 where the completion has a form, else 0.

    Such a form is ``<think>.*</think>\s*<answer>.*</answer>``.

    Args:
        prompt: not used.
        completion: the sampled text.
        answer: not used.
        metadata: not used.
        pattern: a Python regular expression; ``.`` matches a newline too.
        whole: the pattern must match the whole completion, less white space at both ends; else a
            part is enough.
    """
    matcher = re.compile(pattern, re.DOTALL)  # re keeps compiled patterns
    if whole:
        match = matcher.fullmatch(completion.strip())
    else:
        match = matcher.search(completion)
    return 0.0 if match is None else 1.0


def _check_regex_match(*, pattern: str, whole: bool = True) -> None:
    require_pattern("pattern", pattern)
    require_switch("whole", whole)


regex_match.check_options = _check_regex_match  # type: ignore[attr-defined]
