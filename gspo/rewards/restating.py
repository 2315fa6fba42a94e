"""Comparison of a completion with its prompt: does it only say again what it was asked?"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

# Chat templates' tokens with the role behind them, e.g. <|im_start|>user; and other elements.
_TEMPLATE = re.compile(r"<[|｜][^<>]*[|｜]>(?:system|user|assistant)?|</?\w+>")
_WORD = re.compile(r"\w+|[^\w\s]")
_RUN_LENGTH = 8  # words; shorter runs are shared by texts that only speak of the same
_LEAST_WORDS = 3  # of a prompt that can be repeated
_LEAST_SHARE = 0.5  # of the prompt's runs


def repeats_prompt(prompt: str, text: str) -> bool:
    """Whether a text has at least half of the prompt's runs of eight words.

    A prompt of fewer than eight words is one run. Neither the tokens of a chat template nor upper
    and lower case count. No text repeats a prompt of fewer than three words.
    """
    runs, length = _runs_of(prompt)
    if not runs:
        return False
    words = split_words(text)
    runs_of_text = set()
    for start in range(len(words) - length + 1):
        run = tuple(words[start : start + length])
        runs_of_text.add(run)
    num_shared = len(runs & runs_of_text)
    return num_shared >= _LEAST_SHARE * len(runs)


def is_part_of(prompt: str, text: str) -> bool:
    """Whether the words of a text stand in the prompt in a row."""
    part = " ".join(split_words(text))
    whole = " ".join(split_words(prompt))
    return part != "" and f" {part} " in f" {whole} "


def same_number(left: str, right: str) -> bool:
    """Whether two texts are the same decimal number, or whole-number fraction."""
    try:
        return Fraction(left.strip()) == Fraction(right.strip())
    except (ValueError, ZeroDivisionError):
        return False


def split_words(text: str) -> list[str]:
    """Return a text's words and signs in lower case, without the tokens of a chat template."""
    plain = _TEMPLATE.sub(" ", text)
    return _WORD.findall(plain.casefold())


@functools.lru_cache(maxsize=256)  # the completions of a group share their prompt
def _runs_of(prompt: str) -> tuple[frozenset[tuple[str, ...]], int]:
    words = split_words(prompt)
    if len(words) < _LEAST_WORDS:
        return frozenset(), 0
    length = min(_RUN_LENGTH, len(words))
    starts = range(len(words) - length + 1)
    runs = frozenset(tuple(words[start : start + length]) for start in starts)
    return runs, length
