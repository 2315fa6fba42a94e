"""Special tokens that a tokenizer makes of their characters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from gspo.sampling.fingerprint import special_ids


def any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern of the longest token at a place; None for no tokens."""
    longest_first = sorted(tokens, key=len, reverse=True)
    if not longest_first:
        return None
    return re.compile("|".join(re.escape(token) for token in longest_first))


def special_tokens_from_text(tokenizer: Any) -> dict[str, int]:
    """Return {token: id} of the special tokens that ``encode`` makes of their own characters.

    One character cannot be cut, so tokens of one are left out.
    """
    ids = special_ids(tokenizer) | _huggingface_special_ids(tokenizer)
    tokens = {}
    for token, number in ids.items():
        if len(token) > 1 and number in tokenizer.encode(token, add_bos=False, add_eos=False):
            tokens[token] = number
    return tokens


def _huggingface_special_ids(tokenizer: Any) -> dict[str, int]:
    """Return {token: id} of the special tokens of a wrapped tokenizer of Hugging Face's.

    Some files call a chat's turn markers not special, DeepSeek's ``<｜User｜>`` among them: angle
    brackets tell those from words and blanks that were added to a vocabulary.
    """
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if not hasattr(inner, "get_added_tokens_decoder"):
        return {}
    ids = {}
    for number, token in inner.get_added_tokens_decoder().items():
        in_brackets = token.content.startswith("<") and token.content.endswith(">")
        if token.special or in_brackets:
            ids[token.content] = number
    return ids
