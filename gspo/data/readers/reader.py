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
from torchtune import utils

from gspo.data.readers.chat import ChatPrompts, Messages, MessagesColumn, MessageTemplates
from gspo.data.readers.rows import Rows, require_field, require_plain
from gspo.data.readers.template import Encoder, PromptTemplate, Template
from gspo.errors import DataError, require
from gspo.types import Prompt

logger = logging.getLogger(__name__)

_DEFAULT_TEMPLATE = "{question}"
_MAX_HEAD, _MAX_TAIL = 800, 400  # characters of the prompt that is logged
_WITHOUT_ANSWERS = "set answer_column: null where no reward needs an answer"


class PromptReader(BaseNode[Prompt]):
    """A node that yields the prompts of one data-parallel rank, epoch after epoch.

    Every epoch takes a fresh permutation of the rows, the same on all ranks, of which each rank
    takes its own strided part: no two ranks draw the same prompt in an epoch. Prompts are tokenised
    when they are drawn. Rows that are skipped for their length are counted in ``num_skipped``. The
    first row's prompt is logged once, on the first rank, with its number of tokens.

    Prompts are of three kinds: text from ``prompt_template``; the messages in ``messages_column``;
    messages from ``chat``. The tokenizer's chat template renders messages and opens the answer's
    turn. Only :func:`gspo.models.huggingface.tokenizer` reads one.

    Args:
        rows: the source.
        tokenizer: has torchtune's ``encode(text, add_bos=, add_eos=)``.
        prompt_template: a text with ``{name}`` for the row's fields; a literal brace is doubled.
            The tokenizer's special tokens may stand in it; in a row they are text.
        messages_column: the field that holds a list of mappings with ``role`` (system, user,
            assistant or tool) and ``content``, the last one not the assistant's.
        chat: templates like ``prompt_template`` of the ``user`` message, and of a ``system``
            message before it.
        chat_template_arguments: keyword arguments of the chat template, e.g. ``enable_thinking``.
        answer_column: the field that holds the reference answer; None for prompts without one.
        add_bos: put the tokenizer's begin-of-sequence token first; a chat template decides itself.
        max_prompt_tokens: the longest prompt allowed, in tokens; None for no limit.
        on_long_prompt: ``error`` or ``skip``.
        shuffle: permute the rows; else they come in their order.
        seed: of the permutations.
        rank: of this process among the data-parallel ranks.
        world_size: data-parallel ranks.
        num_epochs: passes over the rows; None for no end.

    Raises:
        InputError: An argument is out of range, there are fewer rows than ranks, the tokenizer has
            no chat template or the first row gives no prompt. From ``next``: a row lacks a field or
            has no text, number, boolean or messages there, its prompt is too long or empty or
            begins twice, the chat template raises, or a whole pass was skipped.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Encoder,
        *,
        prompt_template: str = _DEFAULT_TEMPLATE,
        messages_column: str | None = None,
        chat: Mapping[str, str] | None = None,
        chat_template_arguments: Mapping[str, Any] | None = None,
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
        messages = _choose_messages(messages_column, chat)
        self._template = _choose_template(
            tokenizer, prompt_template, messages, chat_template_arguments, add_bos
        )
        self._answer_column = answer_column
        self._max_prompt_tokens = max_prompt_tokens
        self._on_long_prompt = on_long_prompt
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_epochs = num_epochs
        # A wrong column or chat template shows at start, not at step 1,000.
        first, name = rows[0], rows.name(0)
        self._check_fields(first, name)
        text, tokens = self._template.render(first, name)
        _log_first(name, text, len(tokens))

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
        text, tokens = self._template.render(row, name)
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
        self._template.check(row, name)
        if self._answer_column is not None:
            require_field("answer_column", self._answer_column, row, name)
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


def _choose_template(
    tokenizer: Any,
    prompt_template: str,
    messages: Messages | None,
    arguments: Mapping[str, Any] | None,
    add_bos: bool,
) -> Template:
    """Return what makes prompts of messages, if there are any, or of a template."""
    if messages is None:
        must = "are those of a chat template, but prompt_template makes the prompts"
        remedy = "write messages_column or chat in its place, or leave them out"
        require(arguments is None, "chat_template_arguments", arguments, must, remedy)
        return PromptTemplate(prompt_template, tokenizer, add_bos=add_bos)
    is_left_out = prompt_template in (None, _DEFAULT_TEMPLATE)
    must = f"cannot stand beside {messages.key}"
    require(is_left_out, "prompt_template", prompt_template, must, "leave one of them out")
    return ChatPrompts(messages, tokenizer, {} if arguments is None else arguments)


def _choose_messages(
    messages_column: str | None, chat: Mapping[str, str] | None
) -> Messages | None:
    """Return the source of messages; None for prompts without."""
    if chat is None:
        return None if messages_column is None else MessagesColumn(messages_column)
    must = "cannot stand beside messages_column"
    require(messages_column is None, "chat", chat, must, "leave one of them out")
    return MessageTemplates(chat)


def _log_first(name: str, text: str, num_tokens: int) -> None:
    """Log a prompt on the first rank, on one screen with the end that the policy goes on from."""
    if len(text) > _MAX_HEAD + _MAX_TAIL:
        shown = f"{text[:_MAX_HEAD]!r} ... {text[-_MAX_TAIL:]!r}"
    else:
        shown = repr(text)
    message = f"The prompt of {name} has {num_tokens} tokens: {shown}"
    utils.log_rank_zero(utils.get_logger("INFO"), message)


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
