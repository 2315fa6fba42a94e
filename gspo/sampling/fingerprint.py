"""A tokenizer's fingerprint: two tokenizers with the same one give ids the same meaning."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from gspo.errors import InputError

# Where torchtune's tokenizers, and wrappers in their manner, keep the tokenizer that holds the
# vocabulary.
_INNER = ("tokenizer", "tokenizer_model", "tt_model", "_spm_model", "spm_model", "base_tokenizer")

_PROBES = ("two and 3", "solve 45")
_READ_FILES = "give it the tokenizer files of the model, or correct its encode and decode"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the vocabulary and the special tokens.

    They are the same in every process.

    Raises:
        InputError: The tokenizer shows no vocabulary.
    """
    vocabulary = vocabulary_of(tokenizer)
    if vocabulary is None:
        raise InputError(
            "tokenizer",
            type(tokenizer).__name__,
            "shows no vocabulary to take a fingerprint of",
            "give it a `get_vocab()` method that returns {token: id}",
        )
    digest = hashlib.sha256()
    for ids in (vocabulary, special_ids(tokenizer)):
        for entry in _sorted_entries(ids):
            digest.update(repr(entry).encode())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer that loses text: one that decodes to something else, or knows one id.

    Raises:
        InputError: It does.
    """
    name = type(tokenizer).__name__
    all_ids = []
    for text in _PROBES:
        try:
            ids = list(tokenizer.encode(text, add_bos=False, add_eos=False))
            decoded = tokenizer.decode(ids)
        except Exception as error:
            problem = f"fails on {text!r}: {type(error).__name__}: {error}"
            raise InputError("tokenizer", name, problem, _READ_FILES) from error
        if _characters(text) not in _characters(decoded):
            problem = f"makes {decoded!r} of {text!r} when it encodes and decodes it"
            raise InputError("tokenizer", name, problem, _READ_FILES)
        all_ids.append(ids)
    first, second = all_ids
    if first == second:
        problem = f"gives {_PROBES[0]!r} and {_PROBES[1]!r} the same ids {first}"
        raise InputError("tokenizer", name, problem, _READ_FILES)


def check_vocabulary(tokenizer: Any, num_embeddings: int) -> None:
    """Refuse a tokenizer with words that the model has no embedding of.

    Special and added tokens may lie outside: a text model of a family whose others see images has
    tokens for these.

    Args:
        tokenizer: shows its vocabulary, or nothing is compared.
        num_embeddings: of the model.

    Raises:
        InputError: It has.
    """
    vocabulary = vocabulary_of(tokenizer) or {}
    words = set(vocabulary.values()) - set(special_ids(tokenizer).values())
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "get_added_tokens_decoder"):
        words -= inner.get_added_tokens_decoder().keys()
    last = max(words, default=0)
    if last >= num_embeddings:
        name = type(tokenizer).__name__
        must = f"has the token id {last}, outside the model's vocabulary of {num_embeddings}"
        raise InputError("tokenizer", name, must, "use the tokenizer that belongs to the model")


def _characters(text: str) -> str:
    """Return letters and digits alone: tokenizers differ in blanks and in case."""
    return "".join(character for character in text.lower() if character.isalnum())


def _sorted_entries(ids: Mapping[Any, int]) -> list[tuple[int, bytes]]:
    entries = []
    for token, number in ids.items():
        entries.append((int(number), _as_bytes(token)))
    return sorted(entries)


def _as_bytes(token: str | bytes) -> bytes:
    return token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass")


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Return {token: id} of the tokenizer's ``special_tokens``; empty if it names none."""
    named = getattr(tokenizer, "special_tokens", None)
    return named if isinstance(named, dict) else {}


def vocabulary_of(tokenizer: Any) -> dict[Any, int] | None:
    """Return {token: id} of the tokenizer or of the one inside it; None if it shows none."""
    if callable(getattr(tokenizer, "get_vocab", None)):
        return tokenizer.get_vocab()
    for name in ("encoder", "_mergeable_ranks", "vocab"):
        vocabulary = getattr(tokenizer, name, None)
        if isinstance(vocabulary, dict):
            return vocabulary
    if callable(getattr(tokenizer, "id_to_piece", None)):
        return {tokenizer.id_to_piece(i): i for i in range(tokenizer.get_piece_size())}
    for name in _INNER:
        inner = getattr(tokenizer, name, None)
        vocabulary = None if inner is None else vocabulary_of(inner)
        if vocabulary is not None:
            return vocabulary
    return None
