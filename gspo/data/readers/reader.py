"""Prompt readers: JSONL, Parquet, Hugging Face datasets and reasoning-gym.

One node, :class:`PromptReader`, does everything that readers share; a source only gives rows by index. The functions
that a config names (``jsonl_prompts`` and so on) put the two together from one flat set of keywords.

Prompts are text from a template and not chat messages: a chat model's turn markers belong into the template. A special
token of the tokenizer that is written there becomes that one token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torchdata.nodes import BaseNode

from gspo.data.readers.rows import Rows
from gspo.data.readers.template import _template_fields, _template_pieces
from gspo.errors import InputError
from gspo.types import Prompt

logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """The part of a torchtune tokenizer that readers use."""

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        """The token ids of ``text``."""
        ...


class PromptReader(BaseNode[Prompt]):
    """Yields the prompts of one data-parallel rank, epoch after epoch.

    Every epoch takes a fresh permutation of the rows, the same on all ranks, of which each rank takes its own strided
    part: no two ranks draw the same prompt in an epoch. Prompts are tokenised when they are drawn. Rows that are
    skipped for their length are counted in ``num_skipped``.

    Args:
        rows: the source.
        tokenizer: has torchtune's ``encode(text, add_bos=, add_eos=)``.
        prompt_template: a format string over the row's fields; a literal brace is doubled. The tokenizer's special
            tokens may stand in it.
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
        InputError: on construction, a knob is out of range, there are fewer rows than ranks or the first row lacks a
            field; on drawing, a row lacks a field, or its prompt is too long or empty or begins twice, or a whole pass
            was skipped.
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
        if on_long_prompt not in ("error", "skip"):
            raise InputError(f"on_long_prompt: {on_long_prompt!r} must be 'error' or 'skip'")
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise InputError(
                f"max_prompt_tokens: {max_prompt_tokens} must be at least 1, or null for no limit"
            )
        if not 0 <= rank < world_size:
            raise InputError(
                f"rank: {rank} must be at least 0 and less than world_size: {world_size}"
            )
        if len(rows) < world_size:
            raise InputError(
                f"{rows.name(0)}: {len(rows)} rows are too few for {world_size} data-parallel ranks, "
                "which draw different prompts; add rows or use fewer ranks"
            )
        self._rows = rows
        self._tokenizer = tokenizer
        self._template = prompt_template
        self._fields = _template_fields(prompt_template)
        self._pieces = _template_pieces(prompt_template, tokenizer)
        self._answer_column = answer_column
        self._add_bos = add_bos
        self._max_prompt_tokens = max_prompt_tokens
        self._on_long_prompt = on_long_prompt
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_epochs = num_epochs
        self._check_fields(
            rows[0], rows.name(0)
        )  # a wrong column shows at start, not at step 1,000

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on where ``initial_state`` was taken.

        Raises:
            InputError: the state is of another number of rows or ranks.
        """
        super().reset(initial_state)
        state = initial_state or {}
        for key, found in (("num_rows", len(self._rows)), ("world_size", self._world_size)):
            if state.get(key, found) != found:
                raise InputError(
                    f"the prompt reader's saved state has {key} {state[key]}, this run has {found}; "
                    "resume with the same data and ranks, or start the data anew"
                )
        self._epoch: int = state.get("epoch", 0)
        self._position: int = state.get("position", 0)  # in this rank's part of the epoch's order
        self._num_yielded: int = state.get("num_yielded", 0)  # in this epoch
        self.num_skipped: int = state.get("num_skipped", 0)  # since the start
        self._order = self._epoch_order()

    def get_state(self) -> dict[str, Any]:
        """The place in the epochs, as plain integers."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "num_yielded": self._num_yielded,
            "num_skipped": self.num_skipped,
            "num_rows": len(self._rows),
            "world_size": self._world_size,
        }

    def next(self) -> Prompt:
        """The next prompt that is not skipped."""
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
            raise InputError(
                f"{self._rows.name(0)}: all {len(self._order)} prompts of a pass are longer than "
                f"max_prompt_tokens: {self._max_prompt_tokens} and were skipped; raise it or shorten the prompts"
            )
        self._epoch += 1
        self._position = self._num_yielded = 0
        self._order = self._epoch_order()

    def _prompt(self, index: int) -> Prompt | None:
        row, name = self._rows[index], self._rows.name(index)
        self._check_fields(row, name)
        text = self._template.format_map(row)
        tokens = self._encode(row)
        if not tokens:
            raise InputError(
                f"{name}: the prompt {text!r} has no tokens; a sampler needs one, e.g. add_bos: true"
            )
        if len(tokens) > 1 and tokens[0] == tokens[1] == getattr(self._tokenizer, "bos_id", None):
            raise InputError(
                f"prompt_template: {name} begins with the token {tokens[0]} (begin of sequence) twice; "
                "take it out of the template, the tokenizer adds it, or set add_bos: false"
            )
        if self._max_prompt_tokens is not None and len(tokens) > self._max_prompt_tokens:
            self._handle_long(name, len(tokens))
            return None
        answer = None if self._answer_column is None else row[self._answer_column]
        return Prompt(name, text, tokens, None if answer is None else str(answer), row)

    def _encode(self, row: Mapping[str, Any]) -> list[int]:
        if len(self._pieces) == 1:
            return self._tokenizer.encode(
                self._template.format_map(row), add_bos=self._add_bos, add_eos=False
            )
        bos_id = getattr(self._tokenizer, "bos_id", None)
        tokens = [bos_id] if self._add_bos and bos_id is not None else []
        for piece in self._pieces:
            if isinstance(piece, int):
                tokens.append(piece)
            else:
                tokens += self._tokenizer.encode(
                    piece.format_map(row), add_bos=False, add_eos=False
                )
        return tokens

    def _check_fields(self, row: Mapping[str, Any], name: str) -> None:
        wanted = [("prompt_template", field) for field in self._fields]
        if self._answer_column is not None:
            wanted.append(("answer_column", self._answer_column))
        for key, field in wanted:
            if field not in row:
                raise InputError(
                    f"{key}: {name} has no field {field!r}; it has {', '.join(map(repr, row))}"
                )

    def _handle_long(self, name: str, num_tokens: int) -> None:
        if self._on_long_prompt == "error":
            raise InputError(
                f"{name}: the prompt has {num_tokens} tokens, more than max_prompt_tokens: {self._max_prompt_tokens}; "
                "raise it, shorten the prompt or set on_long_prompt: skip"
            )
        if self.num_skipped == 0:
            logger.warning(
                "%s: skipped, %d tokens are more than max_prompt_tokens: %d. More are counted and not logged.",
                name,
                num_tokens,
                self._max_prompt_tokens,
            )
        self.num_skipped += 1
