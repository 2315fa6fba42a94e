"""A tokenizer's fingerprint: two tokenizers with the same one give ids the same meaning."""

from __future__ import annotations

import hashlib
from typing import Any

from gspo.errors import InputError

# Where torchtune's tokenizers, and wrappers in their manner, keep the tokenizer that holds the vocabulary.
_INNER = ("tokenizer", "tokenizer_model", "tt_model", "_spm_model", "spm_model", "base_tokenizer")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of the vocabulary and the special tokens, the same in every process.

    Raises:
        InputError: the tokenizer shows no vocabulary.
    """
    vocabulary = vocabulary_of(tokenizer)
    if vocabulary is None:
        raise InputError(
            f"tokenizer: {type(tokenizer).__name__} shows no vocabulary to take a fingerprint of. "
            "Give it a `get_vocab()` method that returns {token: id}."
        )
    specials = getattr(tokenizer, "special_tokens", None)
    specials = specials if isinstance(specials, dict) else {}
    digest = hashlib.sha256()
    for part in (vocabulary, specials):
        for entry in sorted((int(id_), _as_bytes(token)) for token, id_ in part.items()):
            digest.update(repr(entry).encode())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def _as_bytes(token: str | bytes) -> bytes:
    return token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")


def vocabulary_of(tokenizer: Any) -> dict[Any, int] | None:
    """{token: id} of the tokenizer or of the one inside it; None if it shows none."""
    if callable(getattr(tokenizer, "get_vocab", None)):
        return tokenizer.get_vocab()
    for name in ("encoder", "_mergeable_ranks", "vocab"):
        if isinstance(getattr(tokenizer, name, None), dict):
            return getattr(tokenizer, name)
    if callable(getattr(tokenizer, "id_to_piece", None)):
        return {tokenizer.id_to_piece(i): i for i in range(tokenizer.get_piece_size())}
    inner = (getattr(tokenizer, name, None) for name in _INNER)
    return next(
        (found for i in inner if i is not None and (found := vocabulary_of(i)) is not None), None
    )
