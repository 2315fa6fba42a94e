"""Completions cut into segments, for ratios and advantages finer than a document's.

A splitter says for each token of a completion which segment it is in. :class:`AtDelimiter` cuts at a text, for
reasoning steps; one of your own is any callable of a completion.

What is not here: what a segment is for, see :class:`gspo.losses.SegmentLoss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchdata.nodes import BaseNode

from gspo.data.node import Stateless
from gspo.errors import InputError
from gspo.types import Completion, Rollout

Splitter = Callable[[Completion], list[int] | None]


class AtDelimiter:
    r"""A segment ends with a delimiter and the blank tokens behind it, as a paragraph does with an empty line.

    Args:
        tokenizer: the trainer's; the recipe gives it.
        delimiter: text, which may lie across tokens; a token that goes on behind it still belongs to the segment.

    Raises:
        InputError: an empty delimiter.
    """

    def __init__(self, tokenizer: Any, *, delimiter: str = "\n\n") -> None:
        if not isinstance(delimiter, str) or not delimiter:
            raise InputError(
                f"segments.delimiter: {delimiter!r} is no text to cut at. Give one, e.g. '\\n\\n'."
            )
        if "\\n" in delimiter:
            raise InputError(
                f"segments.delimiter: {delimiter!r} has a backslash and an n where a newline is meant. Write it as "
                'delimiter: "\\n" in YAML, or as \'segments.delimiter="\\n"\' on the command line.'
            )
        self._tokenizer = tokenizer
        self._delimiter = delimiter
        self._texts: dict[int, str] = {}  # of tokens

    def __call__(self, completion: Completion) -> list[int]:
        """The segment of each token, from 0 and ascending."""
        segments, segment, text, ended = [], 0, "", False
        for token in completion.tokens:
            piece = self._text(token)
            if ended and piece.strip():
                segment, text, ended = segment + 1, "", False
            segments.append(segment)
            text = (text + piece)[
                -len(self._delimiter) - len(piece) :
            ]  # all that can hold a delimiter not yet seen
            ended = ended or self._delimiter in text
        return segments

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


class Segment(Stateless[Rollout]):
    """Fills ``completion.segments``.

    Args:
        source: a node of rollouts with advantages.
        splitter: called with each completion; returns the segment of each of its tokens, a number from 0, or none to
            leave it whole. It may set ``completion.segment_advantages`` too, one for each segment; where completions
            of equal rewards get some, keep their groups with ``drop_dead_groups: false``.

    Raises:
        InputError: from ``next``, segments or advantages that do not fit the completion.
    """

    def __init__(self, source: BaseNode[Rollout], splitter: Splitter) -> None:
        super().__init__(source)
        self.splitter = splitter

    def next(self) -> Rollout:
        """The next rollout, its completions cut."""
        rollout = next(self.source)
        for group in rollout.groups:
            for completion in group.completions:
                found = [int(number) for number in self.splitter(completion) or ()]
                completion.segments = found or [0] * len(completion.tokens)
                _check(completion, group.prompt.id)
        return rollout


def _check(completion: Completion, prompt_id: str) -> None:
    tokens, segments, advantages = (
        completion.tokens,
        completion.segments,
        completion.segment_advantages,
    )
    lowest, number = min(segments, default=0), max(segments, default=0) + 1
    remedy = f"Correct the splitter, for a completion of prompt {prompt_id}."
    if len(segments) != len(tokens):
        raise InputError(f"segments: {len(segments)} numbers for {len(tokens)} tokens. {remedy}")
    if lowest < 0:
        raise InputError(f"segments: {lowest} is not a number from 0. {remedy}")
    if advantages and len(advantages) != number:
        raise InputError(f"segments: {len(advantages)} advantages for {number} segments. {remedy}")
