"""Conditions on the options of rewards, which their ``check_options`` state before a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gspo.errors import InputError, did_you_mean, require
from gspo.rewards.extraction import RULES

TRUNCATED = ("zero", "score")


def require_switch(key: str, value: Any) -> None:
    """Raise an InputError unless the value is true or false."""
    require(isinstance(value, bool), key, value, "must be true or false")


def require_text(key: str, value: Any) -> None:
    """Raise an InputError unless the value is a text, which may be empty."""
    require(isinstance(value, str), key, value, "must be a text", "put it in quotes")


def require_mark(key: str, value: Any) -> None:
    """Raise an InputError unless the value is a text to look for, or None for none."""
    is_mark = value is None or (isinstance(value, str) and value != "")
    require(is_mark, key, value, "must be a text of a character or more, or null")


def require_whole(key: str, value: Any, *, least: int) -> None:
    """Raise an InputError unless the value is a whole number of ``least`` or more."""
    is_whole = type(value) is int and value >= least
    require(is_whole, key, value, f"must be a whole number of {least} or more")


def require_pattern(key: str, value: Any) -> None:
    """Raise an InputError unless the value is a regular expression of Python's."""
    require_text(key, value)
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        must = f"is no regular expression: {error}"
        raise InputError(key, value, must, "escape what stands for itself") from error


def require_truncated(value: Any) -> None:
    """Raise an InputError unless the value says what a truncated completion earns."""
    must = "must be zero or score"
    remedy = "zero gives a truncated completion 0, score looks at it like at another"
    require(value in TRUNCATED, "truncated", value, must, remedy)


def check_extraction(extraction: Any, marker: Any) -> None:
    """Raise an InputError unless there is such a rule, with a marker where it needs one."""
    if not isinstance(extraction, str) or extraction not in RULES:
        must = f"must be one of {', '.join(RULES)}"
        hint = did_you_mean(str(extraction), RULES)
        raise InputError("extraction", extraction, must, hint)
    require_mark("marker", marker)
    needs_marker = extraction == "after_marker"
    if needs_marker and marker is None:
        must = "is needed by extraction: after_marker"
        raise InputError("marker", marker, must, 'write e.g. "####"')
    if not needs_marker and marker is not None:
        must = f"is not looked for by extraction: {extraction}"
        raise InputError("marker", marker, must, "set extraction: after_marker, or take it out")


def check_place(extraction: Any, marker: Any, last_line: Any, tag: Any = None) -> None:
    """Check the options of a reward whose final answer is the whole text by default.

    Raises:
        InputError: One of them is of no use, or two of them disagree.
    """
    require_mark("marker", marker)
    require_mark("tag", tag)
    require_switch("last_line", last_line)
    if extraction is None:
        return
    check_extraction(extraction, marker)
    others = {"last_line": last_line, "tag": tag}
    for key, value in others.items():
        must = f"does not go with extraction: {extraction}"
        require(not value, key, value, must, "take one of them out")


def is_cut(metadata: Mapping[str, Any], truncated: str) -> bool:
    """Whether a completion was cut by its length, and that counts.

    Args:
        metadata: without ``finish_reason`` the completion is whole.
        truncated: the reward's option.
    """
    return truncated == "zero" and metadata.get("finish_reason") == "length"
