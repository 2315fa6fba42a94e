"""A transformers tokenizer in the form of torchtune's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from gspo.errors import DataError, InputError, first_line, require
from gspo.models.huggingface.causal_lm import check_folder

# One of them has a tokenizer's vocabulary, or says where it is.
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_REMEDY = "give the folder of a model, with its tokenizer.json and tokenizer_config.json"


def tokenizer(path: str) -> HuggingFaceTokenizer:
    """Read the tokenizer of a model's folder.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    check_folder(path)
    has_files = any(Path(path, name).is_file() for name in _FILES)
    must = f"has none of {', '.join(_FILES)}"
    require(has_files, "path", path, must, _REMEDY)
    try:
        inner = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise InputError(
            "path",
            path,
            f"has no tokenizer that can be read: {first_line(error)}",
            _REMEDY,
        ) from error
    return HuggingFaceTokenizer(inner, _stop_tokens(Path(path), inner))


class HuggingFaceTokenizer:
    """A tokenizer with the methods that torchtune's have.

    Args:
        inner: of transformers.
        stop_tokens: ids that end a completion.
    """

    def __init__(self, inner: Any, stop_tokens: list[int]) -> None:
        self.inner = inner
        self.stop_tokens = stop_tokens
        self.bos_id = inner.bos_token_id
        self.eos_id = inner.eos_token_id
        self.pad_id = inner.pad_token_id
        self.special_tokens: dict[str, int] = {
            token.content: number
            for number, token in inner.added_tokens_decoder.items()
            if token.special
        }

    @property
    def tokenizer(self) -> Any:
        """The tokenizer inside, which lists the tokens that were added to its vocabulary."""
        return getattr(self.inner, "backend_tokenizer", None)

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return len(self.inner)

    def get_vocab(self) -> dict[str, int]:
        """Return {token: id}."""
        return self.inner.get_vocab()

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that makes a prompt of messages; None for one that has none."""
        template = self.inner.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def render_chat(self, messages: list[dict[str, Any]], **arguments: Any) -> str:
        """Return the prompt of messages, up to where the assistant's answer begins.

        transformers runs the template in Jinja's immutable sandbox.

        Args:
            messages: mappings with ``role`` and ``content``.
            arguments: of the template, e.g. ``enable_thinking``.
        """
        return self.inner.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **arguments
        )

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the ids of a text, between those of beginning and end where they are asked for."""
        ids = self.inner.encode(text, add_special_tokens=False)
        if add_bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if add_eos and self.eos_id is not None:
            ids = [*ids, self.eos_id]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens included."""
        return self.inner.decode(ids, clean_up_tokenization_spaces=False)


def _stop_tokens(folder: Path, inner: Any) -> list[int]:
    """Return the ids that end a completion, by what the files of a folder state."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return stop_tokens(None, inner)
    try:
        stated = json.loads(file.read_text()).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        must = f"is no JSON object: {error}"
        raise DataError(str(file), must=must, remedy="get the file again") from error
    ids = stated if isinstance(stated, list) else [stated]
    are_ids = stated is None or all(type(token) is int for token in ids)
    if not are_ids:
        must = "is eos_token_id, which must be a token's id or a list of them"
        raise DataError(str(file), stated, must, "get the file again")
    return stop_tokens(stated, inner)


def stop_tokens(stated: int | list[int] | None, inner: Any) -> list[int]:
    """Return the ids that end a completion.

    Args:
        stated: the generation config's ``eos_token_id``.
        inner: a tokenizer of transformers, whose end it is where nothing is stated.
    """
    if stated is None:
        stated = inner.eos_token_id
    if stated is None:
        return []
    return stated if isinstance(stated, list) else [stated]
