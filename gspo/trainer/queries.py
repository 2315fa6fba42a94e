"""Queries, texts or chats, and what belongs to each, as prompts of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from gspo.data.readers.chat import ChatPrompts, MessagesColumn
from gspo.errors import NO_VALUE, DataError, InputError, require
from gspo.types import Prompt

QUERY = "query"  # the key in a prompt's metadata under which the query stands as it was given
# Names that a reward function is given beside the columns.
TAKEN_NAMES = {
    QUERY,
    *("prompt", "prompts", "completion", "completions", "metadata"),
    *("num_tokens", "finish_reason"),
}


def check_columns(columns: Mapping[str, Sequence[Any]], num_queries: int) -> None:
    """Refuse columns that do not have one value for each query.

    Raises:
        InputError: It names the column.
    """
    for name, column in columns.items():
        is_free = name not in TAKEN_NAMES
        require(
            is_free, name, NO_VALUE, "is a name that reward functions know", "rename the column"
        )
        has_length = hasattr(column, "__len__") and not isinstance(column, str)
        must = f"must have a value for each of the {num_queries} queries"
        if not has_length or len(column) != num_queries:
            raise InputError(name, column, must, "give a list as long as queries")


class QueryReader:
    """A maker of prompts.

    Args:
        tokenizer: in torchtune's form.
        add_bos: begin texts with the tokenizer's first token, if it has one. A chat template writes
            it itself.
    """

    def __init__(self, tokenizer: Any, *, add_bos: bool) -> None:
        self._tokenizer = tokenizer
        self._add_bos = add_bos

    def read(self, query: Any, name: str, row: Mapping[str, Any]) -> Prompt:
        """Return the prompt of a query.

        Args:
            query: a text, or a chat: a list of ``{"role": ..., "content": ...}``.
            name: the prompt's id.
            row: the query's value in each column.

        Raises:
            DataError: It is neither, a message has no known role or is the answer, or the chat
                template raises.
        """
        if isinstance(query, str):
            text = query
            tokens = self._tokenizer.encode(text, add_bos=self._add_bos, add_eos=False)
        elif is_chat(query):
            self._check_chat_template()
            chat = {QUERY: query}
            self._chats.check(chat, name)
            text, tokens = self._chats.render(chat, name)
        else:
            remedy = "give a list of these"
            must = f"is {query!r}, neither a text nor a list of {{'role': ..., 'content': ...}}"
            raise DataError(name, must=must, remedy=remedy)
        answer = row.get("answer")
        metadata = {**row, QUERY: query}
        return Prompt(name, text, tokens, None if answer is None else str(answer), metadata)

    @cached_property
    def _chats(self) -> ChatPrompts:
        """The readers' own rendering, in which no message's text becomes a special token."""
        return ChatPrompts(MessagesColumn(QUERY), self._tokenizer, {})

    def _check_chat_template(self) -> None:
        if getattr(self._tokenizer, "chat_template", None) is None:
            inner = getattr(self._tokenizer, "inner", self._tokenizer)  # of transformers
            must = "has no chat template"
            raise InputError("tokenizer", type(inner).__name__, must, "give queries as texts")


def is_chat(query: Any) -> bool:
    """Whether a query is a list of messages, at least one."""
    if not isinstance(query, list) or not query:
        return False
    for message in query:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return False
    return True
