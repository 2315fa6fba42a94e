"""Templates that make a row's prompt, as text and as tokens.

A chat model's turn markers belong into the template; with :mod:`gspo.data.readers.chat` the
tokenizer's own has them. A special token of the tokenizer that is written there becomes that one
token. The same characters in a row's value stay text, so that no row can end its own turn.
"""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gspo.data.readers.rows import require_field, require_plain
from gspo.data.readers.special import any_of, special_tokens_from_text
from gspo.errors import DataError, InputError, require
from gspo.sampling.fingerprint import special_ids

_DOUBLE = "double a brace that is text, e.g. {{x}}"


class Template(Protocol):
    """A way to make a row's prompt."""

    def check(self, row: Mapping[str, Any], name: str) -> None:
        """Refuse a row, by its name, that the prompt cannot be made of."""
        ...

    def render(self, row: Mapping[str, Any], name: str) -> tuple[str, list[int]]:
        """Return the prompt of a row as text and as tokens."""
        ...


class Encoder(Protocol):
    """The part of a torchtune tokenizer that readers use."""

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        """Return the token ids of ``text``."""
        ...


@dataclass(frozen=True, slots=True)
class Field:
    """The place of a row's value in a template."""

    name: str


Run = list[str | Field]  # literals and fields that are encoded together


class PromptTemplate:
    """A text with the places of a row's fields, for one tokenizer.

    Args:
        template: ``{name}`` is the value of a field; a literal brace is doubled. The tokenizer's
            special tokens may stand in it.
        tokenizer: has torchtune's ``encode(text, add_bos=, add_eos=)``.
        add_bos: put the tokenizer's begin-of-sequence token first.

    Raises:
        InputError: The template has a lone brace, names no field, or has more in a field than a
            name.
    """

    def __init__(self, template: str, tokenizer: Encoder, *, add_bos: bool) -> None:
        self._parts = parse("prompt_template", template)
        self._fields = fields_of(self._parts)
        if not self._fields:
            must = "must name the row's fields, e.g. '{question}'"
            raise InputError("prompt_template", template, must)
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        self._bos_id: int | None = getattr(tokenizer, "bos_id", None)
        # torchtune's wrapper of Hugging Face's tokenizers may add it whatever add_bos says.
        self._always_adds_bos = bool(getattr(tokenizer, "hf_adds_bos", False))
        ids = special_ids(tokenizer)
        _check_special_ids(ids)
        self._pieces = _split_at_special_tokens(self._parts, ids)
        self._from_text = any_of(special_tokens_from_text(tokenizer))

    def check(self, row: Mapping[str, Any], name: str) -> None:
        """Refuse a row without the template's fields.

        Raises:
            InputError: It lacks one, or has no text, number or boolean there.
        """
        check_fields("prompt_template", self._fields, row, name)

    def render(self, row: Mapping[str, Any], name: str) -> tuple[str, list[int]]:
        """Return the prompt of a row that :meth:`check` passes, as text and as tokens.

        Raises:
            InputError: It begins with the begin-of-sequence token twice.
        """
        text = "".join(_texts(self._parts, row))
        tokens = self._encode(row)
        if len(tokens) > 1 and tokens[0] == tokens[1] == self._bos_id:
            raise InputError(
                "prompt_template",
                must=f"{name} begins with the token {tokens[0]} (begin of sequence) twice",
                remedy="take it out of the template, the tokenizer adds it, or set add_bos: false",
            )
        return text, tokens

    def _encode(self, row: Mapping[str, Any]) -> list[int]:
        if len(self._pieces) == 1:
            return self._encode_run(self._parts, row, add_bos=self._add_bos)
        tokens: list[int] = []
        if self._add_bos and self._bos_id is not None:
            tokens.append(self._bos_id)
        for piece in self._pieces:
            if isinstance(piece, int):
                tokens.append(piece)
            else:
                tokens += self._encode_run(piece, row, add_bos=False)
        return tokens

    def _encode_run(self, run: Run, row: Mapping[str, Any], *, add_bos: bool) -> list[int]:
        texts = list(_texts(run, row))
        text = "".join(texts)
        cuts = self._cuts(text, _literal_spans(run, texts))
        first, *others = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
        tokens = self._tokenizer.encode(first, add_bos=add_bos, add_eos=False)
        for other in others:
            continued = self._tokenizer.encode(other, add_bos=False, add_eos=False)
            tokens += continued[1:] if self._always_adds_bos else continued
        return tokens

    def _cuts(self, text: str, literals: list[tuple[int, int]]) -> list[int]:
        """Return where to cut a text, so that no special token but the template's stays whole."""
        if self._from_text is None:
            return []
        cuts = set()
        match = self._from_text.search(text)
        while match:
            begin, end = match.span()
            literal_end = _end_of_literal(begin, literals)
            if end > literal_end:  # not the template's alone
                cuts.add(max(literal_end, begin + 1))
            match = self._from_text.search(text, begin + 1)  # they can overlap
        return sorted(cuts)


def fields_of(parts: Run) -> list[str]:
    """Return the names of the fields in a template."""
    return [part.name for part in parts if isinstance(part, Field)]


def check_fields(key: str, fields: list[str], row: Mapping[str, Any], name: str) -> None:
    """Refuse a row without the fields of a template.

    Args:
        key: of the template in the config.
        fields: that it names.
        row: has to have them.
        name: of the row.

    Raises:
        InputError: It lacks one, or has no text, number or boolean there.
    """
    for field in fields:
        require_field(key, field, row, name)
        require_plain(row[field], field, name)


def parse(key: str, template: str) -> Run:
    """Return the literals and fields of a template, which stands under a key of the config.

    Raises:
        InputError: It has a lone brace, or more in a field than a name.
    """
    is_text = isinstance(template, str)
    require(is_text, key, template, "must be a text", "write e.g. '{question}'")
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        must = f"is no format string: {error}"
        raise InputError(key, template, must, _DOUBLE) from error
    parts: Run = []
    literal = ""  # a doubled brace ends a text of the parser's, and no literal
    for text, name, spec, conversion in parsed:
        literal += text
        if name is None:
            continue
        _check_field(key, template, name, spec, conversion)
        if literal:
            parts.append(literal)
        parts.append(Field(name))
        literal = ""
    if literal:
        parts.append(literal)
    _check_colons(key, template, parts)
    return parts


def _check_special_ids(ids: Mapping[str, int]) -> None:
    """Refuse special tokens that are all one: a stop token would then be any of them."""
    if len(ids) > 1 and len(set(ids.values())) == 1:
        must = f"all {len(ids)} special tokens have the id {next(iter(ids.values()))}"
        raise DataError("tokenizer", must=must, remedy="get its files again")


def _check_colons(key: str, template: str, parts: Run) -> None:
    """Refuse ``{name:}``, which the parser shows as ``{name}``."""
    written = ""
    for part in parts:
        if isinstance(part, Field):
            written += f"{{{part.name}}}"
        else:
            written += part.replace("{", "{{").replace("}", "}}")
    must = "has a colon in a field, which must be a column's name alone, e.g. {question}"
    require(written == template, key, template, must, "drop the colon")


def _check_field(
    key: str, template: str, name: str, spec: str | None, conversion: str | None
) -> None:
    if not name and not spec and not conversion:
        must = "must name the row's fields, e.g. '{question}', and has {}"
        raise InputError(key, template, must, _DOUBLE)
    is_plain = not spec and not conversion and name and not set(name) & set(".[]")
    if not is_plain:
        field = name
        if conversion:
            field += f"!{conversion}"
        if spec:
            field += f":{spec}"
        must = f"has {{{field[:40]}}}, but a field must be a column's name alone, e.g. {{question}}"
        raise InputError(key, template, must, _DOUBLE)


def _texts(run: Run, row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the text of every literal and field."""
    for part in run:
        yield str(row[part.name]) if isinstance(part, Field) else part


def _literal_spans(run: Run, texts: list[str]) -> list[tuple[int, int]]:
    """Return where the literals of a run begin and end in its text."""
    spans = []
    begin = 0
    for part, text in zip(run, texts, strict=True):
        end = begin + len(text)
        if isinstance(part, str):
            spans.append((begin, end))
        begin = end
    return spans


def _end_of_literal(position: int, literals: list[tuple[int, int]]) -> int:
    """Return the end of the literal around a position; the position itself inside a value."""
    for begin, end in literals:
        if begin <= position < end:
            return end
    return position


def _split_at_special_tokens(parts: Run, ids: Mapping[str, int]) -> list[int | Run]:
    """Cut a template at the special tokens in its literals, which are given by id.

    Not every ``encode`` finds them: torchtune's for Llama 3 takes ``<|eot_id|>`` for plain text.
    """
    pattern = any_of(ids)
    if pattern is None:
        return [parts]
    pieces: list[int | Run] = []
    run: Run = []
    for part in parts:
        for piece in _split(pattern, part):
            if isinstance(piece, str) and piece in ids:
                if run:
                    pieces.append(run)
                pieces.append(ids[piece])
                run = []
            else:
                run.append(piece)
    return [*pieces, run] if run else pieces


def _split(pattern: re.Pattern[str], part: str | Field) -> Run:
    """Return the matches in a literal and what stands between them; a field as it is."""
    if isinstance(part, Field):
        return [part]
    return [piece for piece in re.split(f"({pattern.pattern})", part) if piece]
