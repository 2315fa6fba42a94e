"""Rewards of test runs. An untrained policy earns some of ``variety``, and its groups differ."""

import math
import time


def variety(prompt, completion, answer, metadata, *, marker="="):
    """Between 0 and 1, by the number of distinct characters."""
    return len(set(completion)) % 4 / 3


def raises(prompt, completion, answer, metadata, *, marker="="):
    """Fails on every second completion or so."""
    if len(completion) % 2:
        raise KeyError("no such field")
    return variety(prompt, completion, answer, metadata)


def hangs(prompt, completion, answer, metadata, *, marker="="):
    """Never answers for the few completions that hold a digit."""
    if any(character.isdigit() for character in completion):
        time.sleep(60)
    return variety(prompt, completion, answer, metadata)


def nan(prompt, completion, answer, metadata, *, marker="="):
    """Not a number on every second completion or so."""
    return math.nan if len(completion) % 2 else variety(prompt, completion, answer, metadata)


def constant(prompt, completion, answer, metadata, *, marker="="):
    """The same for all: every group is dead."""
    return 0.5
