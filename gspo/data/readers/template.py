"""Templates of prompts."""

from __future__ import annotations

import re
import string
from typing import Any

from gspo.errors import InputError


def _template_fields(template: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(
            f"prompt_template: {template!r}: {error}; double a brace that is text"
        ) from error
    fields = [name.replace("[", ".").partition(".")[0] for name in names]
    if "" in fields or not fields:
        raise InputError(
            f"prompt_template: {template!r} must name the row's fields, e.g. '{{question}}'"
        )
    return fields


def _template_pieces(template: str, tokenizer: Any) -> list[str | int]:
    """The template cut at the special tokens written in it, which are given by id.

    Not every ``encode`` finds them: torchtune's for Llama 3 takes ``<|eot_id|>`` for plain text.
    """
    special_tokens = getattr(tokenizer, "special_tokens", None)
    if not special_tokens or not isinstance(special_tokens, dict):
        return [template]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", template)
    return [
        special_tokens[piece] if piece in special_tokens else piece for piece in pieces if piece
    ]
