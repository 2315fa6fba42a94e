"""Conditions on the options of rewards, which their ``check_options`` state before a run."""

from __future__ import annotations

import re
from typing import Any

from gspo.errors import InputError, require


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
