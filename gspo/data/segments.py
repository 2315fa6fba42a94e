"""Completions cut into segments, for ratios and advantages finer than a document's.

A splitter says for each token of a completion which segment it is in. :class:`AtDelimiter` cuts at
a text, for reasoning steps; one of your own is any callable of a completion.

Not here: the use of segments, see :class:`gspo.losses.SegmentLoss`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torchdata.nodes import BaseNode

from gspo.data.node import TransformNode, as_numbers
from gspo.errors import DataError, require
from gspo.types import Completion, GroupBatch

MAX_SEGMENTS = 2**20  # of a completion

Splitter = Callable[[Completion], list[int] | None]


class AtDelimiter:
    r"""A splitter that ends a segment with a delimiter and the blank tokens behind it.

    Args:
        tokenizer: the trainer's; the recipe gives it.
        delimiter: text, which may lie across tokens; a token that goes on behind it still belongs
            to the segment. An empty line makes paragraphs.

    Raises:
        InputError: An empty delimiter, or one with a backslash and an n for a newline.
    """

    def __init__(self, tokenizer: Any, *, delimiter: str = "\n\n") -> None:
        is_text = isinstance(delimiter, str) and bool(delimiter)
        require(is_text, "delimiter", delimiter, "is no text to cut at", "give one, e.g. '\\n\\n'")
        require(
            "\\n" not in delimiter,
            "delimiter",
            delimiter,
            "has a backslash and an n where a newline is meant",
            'write it as delimiter: "\\n" in YAML, or as \'segments.delimiter="\\n"\' on the '
            "command line",
        )
        self._tokenizer = tokenizer
        self._delimiter = delimiter
        self._texts: dict[int, str] = {}  # of tokens

    def __call__(self, completion: Completion) -> list[int]:
        """Return the segment of each token, from 0 and ascending."""
        segments: list[int] = []
        segment = 0
        text = ""  # the end of the segment so far
        has_ended = False
        for token in completion.tokens:
            token_text = self._text(token)
            if has_ended and token_text.strip():
                segment += 1
                text = ""
                has_ended = False
            segments.append(segment)
            # All that can hold a delimiter not yet seen.
            num_kept = len(self._delimiter) + len(token_text)
            text = (text + token_text)[-num_kept:]
            has_ended = has_ended or self._delimiter in text
        return segments

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


class Segment(TransformNode[GroupBatch]):
    """A node that fills ``completion.segments``.

    Args:
        source: a node of groups with advantages.
        splitter: called with each completion; returns the segment of each of its tokens, a number
            from 0, or none to leave it whole. It may set ``completion.segment_advantages`` too, one
            for each segment; where completions of equal rewards get some, keep their groups with
            ``drop_dead_groups: false``.

    Raises:
        DataError: From ``next``: segments or advantages that do not fit the completion.
    """

    def __init__(self, source: BaseNode[GroupBatch], splitter: Splitter) -> None:
        super().__init__(source)
        self.splitter = splitter

    def next(self) -> GroupBatch:
        """Return the next groups, their completions cut."""
        batch = next(self.source)
        for group in batch.groups:
            for completion in group.completions:
                self._cut(completion, group.prompt.id)
        return batch

    def _cut(self, completion: Completion, prompt_id: str) -> None:
        place = f"segments of a completion of prompt {prompt_id}"
        remedy = f"correct the splitter, {type(self.splitter).__name__}"
        segments = self.splitter(completion)
        numbers = _whole_numbers([] if segments is None else segments)
        advantages = as_numbers(completion.segment_advantages)
        if numbers is None:
            raise DataError(place, segments, "must be whole numbers, or none", remedy)
        if advantages is None:
            must = "must be a list of numbers, as segment_advantages"
            raise DataError(place, completion.segment_advantages, must, remedy)
        completion.segments = numbers or [0] * len(completion.tokens)
        completion.segment_advantages = advantages
        _check(completion, place, remedy)


def _whole_numbers(values: Any) -> list[int] | None:
    """Return what a splitter has returned as whole numbers; None if it is none."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        return None


def _check(completion: Completion, place: str, remedy: str) -> None:
    num_numbers, num_tokens = len(completion.segments), len(completion.tokens)
    if num_numbers != num_tokens:
        raise DataError(place, must=f"{num_numbers} numbers for {num_tokens} tokens", remedy=remedy)
    lowest = min(completion.segments, default=0)
    if lowest < 0:
        raise DataError(place, lowest, "is not a number from 0", remedy)
    num_segments = max(completion.segments, default=0) + 1
    if num_segments > MAX_SEGMENTS:
        must = f"must be less than {MAX_SEGMENTS:,}, since all numbers up to it get an advantage"
        raise DataError(place, num_segments - 1, must, remedy)
    num_advantages = len(completion.segment_advantages)
    if num_advantages not in (0, num_segments):
        must = f"{num_advantages} advantages for {num_segments} segments"
        raise DataError(place, must=must, remedy=remedy)
