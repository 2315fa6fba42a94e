"""The node that reads prompts from any source.

:class:`PromptReader` does everything that readers share; a source only gives rows by index. The
functions that a config names (:mod:`gspo.data.readers.components`) put the two together from one
flat set of keywords.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from torchdata.nodes import BaseNode

from gspo.data.readers.rows import Rows, require_plain
from gspo.data.readers.template import Encoder, PromptTemplate
from gspo.errors import DataError, InputError, require
from gspo.types import Prompt

logger = logging.getLogger(__name__)

_WITHOUT_ANSWERS = "set answer_column: null where no reward needs an answer"


class PromptReader(BaseNode[Prompt]):
    """A node that yields the prompts of one data-parallel rank, epoch after epoch.

    Every epoch takes a fresh permutation of the rows, the same on all ranks, of which each rank
    takes its own strided part: no two ranks draw the same prompt in an epoch. Prompts are tokenised
    when they are drawn. Rows that are skipped for their length are counted in ``num_skipped``.

    Args:
        rows: the source.
        tokenizer: has torchtune's ``encode(text, add_bos=, add_eos=)``.
        prompt_template: a text with ``{name}`` for the row's fields; a literal brace is doubled.
            The tokenizer's special tokens may stand in it; in a row they are text.
        answer_column: the field that holds the reference answer; None for prompts without one.
        add_bos: put the tokenizer's begin-of-sequence token first.
        max_prompt_tokens: the longest prompt allowed, in tokens; None for no limit.
        on_long_prompt: ``error`` or ``skip``.
        shuffle: permute the rows; else they come in their order.
        seed: of the permutations.
        rank: of this process among the data-parallel ranks.
        world_size: data-parallel ranks.
        num_epochs: passes over the rows; None for no end.

    Raises:
        InputError: An argument is out of range, there are fewer rows than ranks or the first row
            lacks a field. From ``next``: a row lacks a field or has no text, number or boolean
            there, its prompt is too long or empty or begins twice, or a whole pass was skipped.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Encoder,
        *,
        prompt_template: str = "{question}",
        answer_column: str | None = "answer",
        add_bos: bool = True,
        max_prompt_tokens: int | None = None,
        on_long_prompt: str = "error",
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_epochs: int | None = None,
    ) -> None:
        super().__init__()
        _check_length_limit(max_prompt_tokens, on_long_prompt)
        _check_count("num_epochs", num_epochs, "no end")
        _check_switch("add_bos", add_bos)
        is_column = answer_column is None or isinstance(answer_column, str)
        must = "must be a column's name, or null"
        require(is_column, "answer_column", answer_column, must, "change it")
        _check_switch("shuffle", shuffle)
        _check_ranks(rows, rank, world_size)
        self._rows = rows
        self._template = PromptTemplate(prompt_template, tokenizer, add_bos=add_bos)
        self._answer_column = answer_column
        self._max_prompt_tokens = max_prompt_tokens
        self._on_long_prompt = on_long_prompt
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_epochs = num_epochs
        # A wrong column shows at start, not at step 1,000.
        self._check_fields(rows[0], rows.name(0))

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on where ``initial_state`` was taken.

        Raises:
            DataError: The state is of another number of rows or ranks.
        """
        super().reset(initial_state)
        state = initial_state or {}
        self._check_state(state, "num_rows", len(self._rows))
        self._check_state(state, "world_size", self._world_size)
        self._epoch: int = state.get("epoch", 0)
        self._position: int = state.get("position", 0)  # in this rank's part of the epoch's order
        self._num_yielded: int = state.get("num_yielded", 0)  # in this epoch
        self.num_skipped: int = state.get("num_skipped", 0)  # since the start
        self._order = self._epoch_order()

    def get_state(self) -> dict[str, Any]:
        """Return the place in the epochs, as plain integers."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "num_yielded": self._num_yielded,
            "num_skipped": self.num_skipped,
            "num_rows": len(self._rows),
            "world_size": self._world_size,
        }

    def next(self) -> Prompt:
        """Return the next prompt that is not skipped."""
        while True:
            if self._position == len(self._order):
                self._end_epoch()
            if self._num_epochs is not None and self._epoch >= self._num_epochs:
                raise StopIteration
            index = int(self._order[self._position])
            self._position += 1
            prompt = self._prompt(index)
            if prompt is not None:
                self._num_yielded += 1
                return prompt

    def _epoch_order(self) -> np.ndarray:
        order = np.arange(len(self._rows))
        if self._shuffle:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(order)
        return order[self._rank :: self._world_size]

    def _end_epoch(self) -> None:
        if self._num_yielded == 0:
            raise DataError(
                self._rows.name(0),
                must=f"all {len(self._order)} prompts of a pass are longer than "
                f"max_prompt_tokens: {self._max_prompt_tokens} and were skipped",
                remedy="raise it or shorten the prompts",
            )
        self._epoch += 1
        self._position = 0
        self._num_yielded = 0
        self._order = self._epoch_order()

    def _prompt(self, index: int) -> Prompt | None:
        """Return a row's prompt, or None if it is skipped."""
        row = self._rows[index]
        name = self._rows.name(index)
        self._check_fields(row, name)
        text = self._template.text(row)
        tokens = self._template.encode(row, name)
        if not tokens:
            must = f"the prompt {text!r} has no tokens"
            raise DataError(name, must=must, remedy="a sampler needs one, e.g. add_bos: true")
        if self._max_prompt_tokens is not None and len(tokens) > self._max_prompt_tokens:
            self._skip_long(name, len(tokens))
            return None
        return Prompt(name, text, tokens, self._answer(row), row)

    def _answer(self, row: Mapping[str, Any]) -> str | None:
        return None if self._answer_column is None else str(row[self._answer_column])

    def _skip_long(self, name: str, num_tokens: int) -> None:
        if self._on_long_prompt == "error":
            raise DataError(
                name,
                must=f"the prompt has {num_tokens} tokens, more than "
                f"max_prompt_tokens: {self._max_prompt_tokens}",
                remedy="raise it, shorten the prompt or set on_long_prompt: skip",
            )
        if self.num_skipped == 0:
            logger.warning(
                "%s: skipped, %d tokens are more than max_prompt_tokens: %d. More are counted and "
                "not logged.",
                name,
                num_tokens,
                self._max_prompt_tokens,
            )
        self.num_skipped += 1

    def _check_fields(self, row: Mapping[str, Any], name: str) -> None:
        for field in self._template.fields:
            _require_field("prompt_template", field, row, name)
            require_plain(row[field], field, name)
        if self._answer_column is not None:
            _require_field("answer_column", self._answer_column, row, name)
            answer = row[self._answer_column]
            require_plain(answer, self._answer_column, name, instead=_WITHOUT_ANSWERS)

    def _check_state(self, state: Mapping[str, Any], key: str, value: int) -> None:
        saved = state.get(key, value)
        if saved != value:
            raise DataError(
                "the prompt reader's saved state",
                must=f"has {key} {saved}, this run has {value}",
                remedy="resume with the same data and ranks, or start the data anew",
            )


def _require_field(key: str, field: str, row: Mapping[str, Any], name: str) -> None:
    if field not in row:
        names = ", ".join(repr(other) for other in row)
        raise InputError(key, must=f"{name} has no field {field!r}", remedy=f"it has {names}")


def _check_length_limit(max_prompt_tokens: int | None, on_long_prompt: str) -> None:
    is_known = on_long_prompt in ("error", "skip")
    require(is_known, "on_long_prompt", on_long_prompt, "must be 'error' or 'skip'")
    _check_count("max_prompt_tokens", max_prompt_tokens, "no limit")


def _check_count(key: str, value: Any, without: str) -> None:
    is_count = value is None or (type(value) is int and value >= 1)
    must = f"must be a whole number of 1 or more, or null for {without}"
    require(is_count, key, value, must, "change it")


def _check_switch(key: str, value: Any) -> None:
    require(type(value) is bool, key, value, "must be true or false", "write it unquoted")


def _check_ranks(rows: Rows, rank: int, world_size: int) -> None:
    is_rank = 0 <= rank < world_size
    require(is_rank, "rank", rank, f"must be at least 0 and less than world_size: {world_size}")
    if len(rows) < world_size:
        raise DataError(
            rows.name(0),
            must=f"{len(rows)} rows are too few for {world_size} data-parallel ranks, which draw "
            "different prompts",
            remedy="add rows or use fewer ranks",
        )
