"""Templates that make a row's prompt, as text and as tokens.

Prompts are text from a template and not chat messages: a chat model's turn markers belong into the
template. A special token of the tokenizer that is written there becomes that one token.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any, Protocol

from gspo.errors import InputError


class Encoder(Protocol):
    """The part of a torchtune tokenizer that readers use."""

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        """Return the token ids of ``text``."""
        ...


class PromptTemplate:
    """A format string over a row's fields, for one tokenizer.

    Args:
        template: a literal brace is doubled. The tokenizer's special tokens may stand in it.
        tokenizer: has torchtune's ``encode(text, add_bos=, add_eos=)``.
        add_bos: put the tokenizer's begin-of-sequence token first.

    Raises:
        InputError: The template has a lone brace or names no field.
    """

    def __init__(self, template: str, tokenizer: Encoder, *, add_bos: bool) -> None:
        self.fields = _fields(template)
        self._template = template
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        self._bos_id: int | None = getattr(tokenizer, "bos_id", None)
        self._pieces = _split_at_special_tokens(template, tokenizer)

    def text(self, row: Mapping[str, Any]) -> str:
        """Return the prompt of a row."""
        return self._template.format_map(row)

    def encode(self, row: Mapping[str, Any], name: str) -> list[int]:
        """Return the tokens of a row's prompt.

        Args:
            row: has all fields of the template.
            name: of the row, for messages.

        Raises:
            InputError: The prompt begins with the begin-of-sequence token twice.
        """
        tokens = self._encode(row)
        if len(tokens) > 1 and tokens[0] == tokens[1] == self._bos_id:
            raise InputError(
                "prompt_template",
                must=f"{name} begins with the token {tokens[0]} (begin of sequence) twice",
                remedy="take it out of the template, the tokenizer adds it, or set add_bos: false",
            )
        return tokens

    def _encode(self, row: Mapping[str, Any]) -> list[int]:
        if len(self._pieces) == 1:
            return self._tokenizer.encode(self.text(row), add_bos=self._add_bos, add_eos=False)
        tokens: list[int] = []
        if self._add_bos and self._bos_id is not None:
            tokens.append(self._bos_id)
        for piece in self._pieces:
            if isinstance(piece, int):
                tokens.append(piece)
            else:
                text = piece.format_map(row)
                tokens += self._tokenizer.encode(text, add_bos=False, add_eos=False)
        return tokens


def _fields(template: str) -> list[str]:
    """Return the names of the row's fields in a template."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        must = f"is no format string: {error}"
        raise InputError(
            "prompt_template", template, must, "double a brace that is text"
        ) from error
    fields = [name.replace("[", ".").partition(".")[0] for name in names]
    if "" in fields or not fields:
        must = "must name the row's fields, e.g. '{question}'"
        raise InputError("prompt_template", template, must)
    return fields


def _split_at_special_tokens(template: str, tokenizer: Any) -> list[str | int]:
    """Cut a template at the special tokens written in it, which are given by id.

    Not every ``encode`` finds them: torchtune's for Llama 3 takes ``<|eot_id|>`` for plain text.
    """
    special_tokens = getattr(tokenizer, "special_tokens", None)
    if not special_tokens or not isinstance(special_tokens, dict):
        return [template]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    any_of_them = "|".join(re.escape(token) for token in longest_first)
    pieces: list[str | int] = []
    for piece in re.split(f"({any_of_them})", template):
        if piece in special_tokens:
            pieces.append(special_tokens[piece])
        elif piece:
            pieces.append(piece)
    return pieces
