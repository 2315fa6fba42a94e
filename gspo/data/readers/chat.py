"""Prompts that the tokenizer's own chat template makes of messages.

The messages come from a column of the row, or from templates over its columns. The chat template
writes the turn markers, and only what it writes becomes special tokens. The same characters in a
row's value stay text, so that no row can end its own turn or open another.

How a value is told from the template: the template is rendered twice, with the row as it is and
with marks in its values. They are private-use characters at both ends of a value, and behind every
character in it that a special token begins with. A special token with a mark inside is not the
template's, and is cut there. A template that looks into its messages, as Qwen3's does for
``</think>``, can render the marked row to another text; :meth:`ChatPrompts.render` says what holds
then.

Not here: tools, which a template gets with ``chat_template_arguments``, and answers to train on.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from gspo.data.readers.rows import require_field, require_plain
from gspo.data.readers.special import any_of, special_tokens_from_text
from gspo.data.readers.template import Encoder, Field, check_fields, fields_of, parse
from gspo.errors import DataError, InputError, did_you_mean, require

ROLES = ("system", "user", "assistant", "tool")

_Mark = Callable[[str], str]  # changes the texts of a row, and nothing else
_PRIVATE_USE = range(0xE000, 0xF900)
_EXAMPLE = "e.g. [{'role': 'user', 'content': 'What is 6 * 7?'}]"
_CORRECT = "correct the row or take it out"
# What the reader decides, and not a config.
_RESERVED = (
    *("conversation", "messages", "chat_template", "tokenize", "add_generation_prompt"),
    *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
)


class Messages(Protocol):
    """A source of a row's messages."""

    key: str  # in the config

    def check(self, row: Mapping[str, Any], name: str) -> None:
        """Refuse a row, by its name, that gives no messages."""
        ...

    def read(self, row: Mapping[str, Any], mark: _Mark) -> list[dict[str, Any]]:
        """Return the messages of a row that :meth:`check` passes, its texts marked."""
        ...


class MessagesColumn:
    """A column that holds the messages.

    Args:
        column: has a list of mappings with ``role`` and ``content``. What else is in them goes to
            the chat template too.
    """

    key = "messages_column"

    def __init__(self, column: str) -> None:
        is_text = isinstance(column, str)
        require(is_text, self.key, column, "must be a column's name", "write e.g. messages")
        self._column = column

    def check(self, row: Mapping[str, Any], name: str) -> None:
        """Refuse a row whose column is no list of messages that a policy can answer."""
        require_field(self.key, self._column, row, name)
        messages = row[self._column]
        place = f"in column {self._column!r}"
        if isinstance(messages, str):
            must = f"{place} must be a list of messages, {_EXAMPLE}"
            remedy = f"for a text, write chat: {{user: '{{{self._column}}}'}} in its place"
            raise DataError(name, messages, must, remedy)
        if not isinstance(messages, list) or not messages:
            must = f"{place} must be a list of one message or more, {_EXAMPLE}"
            raise DataError(name, messages, must, _CORRECT)
        for number, message in enumerate(messages, start=1):
            _check_message(message, f"as message {number} {place}", name)
            _mark_inside(message, self._require_plain(name))
        if messages[-1]["role"] == "assistant":
            must = f"as last message {place} is the answer, which the policy is to write"
            remedy = "take it out of the messages, and write the answer into a column of its own"
            raise DataError(name, messages[-1], must, remedy)

    def read(self, row: Mapping[str, Any], mark: _Mark) -> list[dict[str, Any]]:
        """Return the column's messages, with all their texts but the roles marked."""
        messages = []
        for message in row[self._column]:
            # Arrow puts a null where a message lacks a key of another.
            filled = {key: value for key, value in message.items() if value is not None}
            marked = _mark_inside(filled, mark)
            marked["role"] = message["role"]
            messages.append(marked)
        return messages

    def _require_plain(self, name: str) -> _Mark:
        """Return what refuses a text that is not of Unicode characters, in a row of this name."""

        def check(text: str) -> str:
            require_plain(text, self._column, name)
            return text

        return check


class MessageTemplates:
    """Messages made of columns: one of the user's, behind one of the system's if there is any.

    Args:
        chat: templates with ``{name}`` for the row's fields, under ``user`` and ``system``.
    """

    key = "chat"

    def __init__(self, chat: Mapping[str, str]) -> None:
        has_user = isinstance(chat, Mapping) and "user" in chat
        must = "must have the user's message as a template"
        require(has_user, self.key, chat, must, "write e.g. {user: '{question}'}")
        self._parts = {}
        for role in ("system", "user"):
            if role in chat:
                self._parts[role] = parse(f"chat.{role}", chat[role])
        for key in chat:
            if key not in self._parts:
                hint = did_you_mean(str(key), ("system", "user"))
                raise InputError(f"chat.{key}", must="is no role of a chat's template", remedy=hint)
        has_fields = any(fields_of(parts) for parts in self._parts.values())
        must = "must name the row's fields, e.g. '{question}'"
        require(has_fields, "chat.user", chat["user"], must)

    def check(self, row: Mapping[str, Any], name: str) -> None:
        """Refuse a row without the templates' fields."""
        for role, parts in self._parts.items():
            check_fields(f"chat.{role}", fields_of(parts), row, name)

    def read(self, row: Mapping[str, Any], mark: _Mark) -> list[dict[str, Any]]:
        """Return the messages with the row's values in them, marked."""
        messages = []
        for role, parts in self._parts.items():
            content = ""
            for part in parts:
                content += mark(str(row[part.name])) if isinstance(part, Field) else part
            messages.append({"role": role, "content": content})
        return messages


class ChatPrompts:
    """Prompts from messages, for one tokenizer with a chat template.

    Args:
        messages: the source.
        tokenizer: has ``chat_template`` and ``render_chat`` as
            :class:`gspo.models.huggingface.tokenizer.HuggingFaceTokenizer` has.
        arguments: of the chat template, e.g. ``enable_thinking``.

    Raises:
        InputError: The tokenizer has no chat template, or it does not read an argument.
    """

    def __init__(self, messages: Messages, tokenizer: Any, arguments: Mapping[str, Any]) -> None:
        _check_chat_template(messages.key, tokenizer)
        _check_arguments(arguments, tokenizer.chat_template)
        self._messages = messages
        self._tokenizer = tokenizer
        self._arguments = _as_plain(arguments)
        special_tokens = special_tokens_from_text(tokenizer)
        self._special_ids = set(special_tokens.values())
        self._special = any_of(special_tokens)
        self._first_characters = {token[0] for token in special_tokens}

    def check(self, row: Mapping[str, Any], name: str) -> None:
        """Refuse a row that gives no messages.

        Raises:
            InputError: It lacks a field, or has something else there.
        """
        self._messages.check(row, name)

    def render(self, row: Mapping[str, Any], name: str) -> tuple[str, list[int]]:
        """Return the prompt of a row that :meth:`check` passes, as text and as tokens.

        The text is the chat template's own. There is one exception, for a template that looks for
        special tokens in its messages and finds some in this row. Where it would write other
        special tokens than without them, the text is what it writes without having seen them.

        Raises:
            DataError: The chat template raises.
        """
        values: list[str] = []

        def keep(value: str) -> str:
            values.append(value)
            return value

        text = self._render(row, name, keep)
        mark = _unused_character([text, *values])
        marked = self._render(row, name, lambda value: self._mark(value, mark))
        seen, marks = _take_out(mark, marked)
        tokens = _encode(self._tokenizer, seen, self._cuts(seen, marks))
        if seen == text:
            return text, tokens
        uncut = _encode(self._tokenizer, text, [])
        if self._special_tokens(uncut) == self._special_tokens(tokens):
            return text, uncut
        return seen, tokens

    def _render(self, row: Mapping[str, Any], name: str, mark: _Mark) -> str:
        messages = self._messages.read(row, mark)
        try:
            return self._tokenizer.render_chat(messages, **self._arguments)
        except Exception as error:  # a template's own, or whatever Python raises inside of it
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(
                name,
                self._messages.read(row, str),
                f"as messages make the chat template raise {problem}",
                "correct the row, or chat_template_arguments, or write a prompt_template instead",
            ) from error

    def _mark(self, value: str, mark: str) -> str:
        """Put marks where a special token may not go on; a template may strip blanks around."""
        inside = value.strip()
        if not inside:
            return value
        before, _, after = value.partition(inside)
        marked = mark
        for character in inside:
            marked += character
            if character in self._first_characters:
                marked += mark
        return f"{before}{marked}{mark}{after}"

    def _cuts(self, text: str, marks: Sequence[int]) -> list[int]:
        """Return where to cut a text, so that no special token has a mark inside."""
        if self._special is None:
            return []
        cuts = set()
        match = self._special.search(text)
        while match:
            begin, end = match.span()
            following = bisect.bisect_right(marks, begin)
            if following < len(marks) and marks[following] < end:
                cuts.add(marks[following])
            match = self._special.search(text, begin + 1)  # they can overlap
        return sorted(cuts)

    def _special_tokens(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if token in self._special_ids]


def _check_message(message: Any, place: str, name: str) -> None:
    is_message = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
    if not is_message:
        must = f"{place} must be a mapping with role and content, {_EXAMPLE}"
        raise DataError(name, message, must, _CORRECT)
    role, content = message["role"], message["content"]
    if role not in ROLES:
        must = f"{place} has the role {role!r}, but there are {', '.join(ROLES)}"
        raise DataError(name, message, must, _CORRECT)
    if not isinstance(content, str):
        must = f"{place} must have a text as content"
        raise DataError(name, message, must, f"{_CORRECT}; no content is ''")


def _check_chat_template(key: str, tokenizer: Any) -> None:
    if not hasattr(tokenizer, "render_chat"):
        raise InputError(
            key,
            must=f"needs a tokenizer with a chat template, which {type(tokenizer).__name__} lacks",
            remedy="take gspo.models.huggingface.tokenizer, or write a prompt_template instead",
        )
    if tokenizer.chat_template is None:
        raise InputError(
            key,
            must="needs a chat template, and the tokenizer has none, as those of base models",
            remedy="write a prompt_template instead, e.g. 'Question: {question}\\nAnswer:', or put "
            "a chat_template.jinja into the tokenizer's folder",
        )


def _check_arguments(arguments: Mapping[str, Any], chat_template: str) -> None:
    key = "chat_template_arguments"
    is_mapping = isinstance(arguments, Mapping)
    must = "must be a mapping of the chat template's arguments"
    require(is_mapping, key, arguments, must, "write e.g. {enable_thinking: false}")
    for argument in arguments:
        place = f"{key}.{argument}"
        if argument in _RESERVED:
            raise InputError(place, must="is decided by the reader", remedy="leave it out")
        if not re.search(rf"\b{re.escape(str(argument))}\b", chat_template):
            must = "is no argument that the tokenizer's chat template reads"
            raise InputError(place, must=must, remedy="correct its name or take it out")


def _as_plain(value: Any) -> Any:
    """Return a config's value with its containers as Python's, which templates tell apart."""
    if isinstance(value, Mapping):
        return {str(key): _as_plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_as_plain(inner) for inner in value]
    return value


def _mark_inside(value: Any, mark: _Mark) -> Any:
    """Mark the texts in a value, and the keys that a template does not know by name."""
    if isinstance(value, str):
        return mark(value)
    if isinstance(value, Mapping):
        marked = {}
        for key, inner in value.items():
            is_name = not isinstance(key, str) or key.isidentifier()
            marked[key if is_name else mark(key)] = _mark_inside(inner, mark)
        return marked
    if isinstance(value, list):
        return [_mark_inside(inner, mark) for inner in value]
    return value


def _unused_character(texts: list[str]) -> str:
    """Return a private-use character that stands in no text."""
    used = {ord(character) for text in texts for character in text}
    return chr(min(set(_PRIVATE_USE) - used))


def _take_out(mark: str, text: str) -> tuple[str, list[int]]:
    """Return a text without its marks, and where they were in it."""
    pieces = text.split(mark)
    ends = itertools.accumulate(len(piece) for piece in pieces)
    return "".join(pieces), list(ends)[:-1]


def _encode(tokenizer: Encoder, text: str, cuts: list[int]) -> list[int]:
    tokens = []
    for begin, end in itertools.pairwise([0, *cuts, len(text)]):
        tokens += tokenizer.encode(text[begin:end], add_bos=False, add_eos=False)
    return tokens
