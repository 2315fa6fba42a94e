"""Rewards that compare or match text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def extract_answer(text: str, *, marker: str | None = None, last_line: bool = False) -> str | None:
    """The part of ``text`` that states the answer, stripped; None where the marker is missing.

    Args:
        text: a completion, or a worked answer in the same form.
        marker: take what follows its last occurrence, to the end of that line, e.g. ``"####"``.
        last_line: take the last line that is not blank.
    """
    if marker is not None:
        _, found, text = text.rpartition(marker)
        if not found:
            return None
        text = text.lstrip().partition("\n")[0]
    elif last_line:
        text = text.rstrip().rpartition("\n")[2]
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
    """1 where the completion's answer is the reference answer, else 0.

    Args:
        prompt: not used.
        completion: the sampled text.
        answer: the reference; where it holds the marker itself (GSM8K's worked answers do), what follows it.
        metadata: not used.
        marker: see :func:`extract_answer`; a completion without it gets 0.
        last_line: see :func:`extract_answer`.
        ignore: characters dropped from both sides before they are compared, e.g. ``",$"``.
        ignore_case: compare without regard to case.

    Raises:
        ValueError: there is no reference answer.
    """
    if answer is None:
        raise ValueError("exact_match needs an answer; set the reader's answer_column")
    given = extract_answer(completion, marker=marker, last_line=last_line)
    if given is None:
        return 0.0
    wanted = (
        extract_answer(answer, marker=marker) if marker and marker in answer else answer.strip()
    )
    return float(
        _normalise(given, ignore, ignore_case) == _normalise(wanted or "", ignore, ignore_case)
    )


def _normalise(text: str, ignore: str, ignore_case: bool) -> str:
    for character in ignore:
        text = text.replace(character, "")
    return text.casefold() if ignore_case else text


def regex_match(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Mapping[str, Any],
    *,
    pattern: str,
    whole: bool = True,
) -> float:
    r"""1 where the completion has a form, else 0, e.g. ``<think>.*</think>\s*<answer>.*</answer>``.

    Args:
        prompt: not used.
        completion: the sampled text.
        answer: not used.
        metadata: not used.
        pattern: a Python regular expression; ``.`` matches a newline too.
        whole: the pattern must match the whole completion, less white space at both ends; else a part is enough.
    """
    matcher = re.compile(pattern, re.DOTALL)  # re keeps compiled patterns
    return float(
        bool(matcher.fullmatch(completion.strip()) if whole else matcher.search(completion))
    )
