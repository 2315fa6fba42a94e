"""The exceptions that a user's input can cause, shown as a message without a stack."""

from __future__ import annotations

import contextlib
import difflib
import dis
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

MAX_SHOWN = 8  # problems in one message, and lines of one, so that it stays on a screen
_MAX_VALUE_LENGTH = 200  # characters


class _NoValue:
    """The type of :data:`NO_VALUE`."""

    def __repr__(self) -> str:
        return "NO_VALUE"


NO_VALUE = _NoValue()  # for an InputError whose key has no value, or none that helps


class InputError(ValueError):
    """A mistake in a user's input, told as ``key: value must; remedy``.

    A component knows the name of its own argument. Whoever builds it from a config adds the
    section with :meth:`within`: ``clip_low`` becomes ``loss.clip_low``.

    Args:
        key: The argument or config key.
        value: What was given, shown as its ``repr``; NO_VALUE shows nothing.
        must: What is wrong with it or has to hold, e.g. ``must be at least 1``.
        remedy: What to change; empty if ``must`` says it.
    """

    def __init__(self, key: str, value: Any = NO_VALUE, must: str = "", remedy: str = "") -> None:
        assert must, "an error says what must hold"
        super().__init__(key, value, must, remedy)
        self.key = key
        self.value = value
        self.must = must
        self.remedy = remedy

    def __str__(self) -> str:
        message = f"{self.key}: "
        if self.value is not NO_VALUE:
            message += f"{show(self.value)} "
        message += self.must
        if self.remedy:
            message += f"; {self.remedy}"
        lines = [printable(line) for line in message.splitlines()]
        num_left = len(lines) - MAX_SHOWN
        if num_left > 0:
            lines[MAX_SHOWN:] = [f"... and {num_left} more lines"]
        return "\n".join(lines)

    def within(self, section: str) -> InputError:
        """Return the same error with its key in a section of the config."""
        return InputError(f"{section}.{self.key}", self.value, self.must, self.remedy)


class DataError(InputError):
    """A mistake in data. The key is a place, such as ``train.jsonl:17``, and not an argument."""

    def within(self, section: str) -> InputError:
        """Return the error itself: a place in data is in no section of the config."""
        return self


class InputErrors(InputError):
    """Several mistakes in one message, each on its own line, the first eight of them.

    Args:
        errors: At least one.
    """

    def __init__(self, errors: Sequence[InputError]) -> None:
        first = errors[0]
        super().__init__(first.key, first.value, first.must, first.remedy)
        self.errors = list(errors)

    def __reduce__(self) -> Any:
        return InputErrors, (self.errors,)

    def __str__(self) -> str:
        lines = [str(error) for error in self.errors[:MAX_SHOWN]]
        num_left = len(self.errors) - len(lines)
        if num_left:
            lines.append(f"and {num_left} more problems in the config")
        return "\n".join(lines)


def require(condition: bool, key: str, value: Any, must: str, remedy: str = "") -> None:
    """Raise an :class:`InputError` unless ``condition`` holds.

    ``require(n > 0, "num_steps", n, "must be at least 1", "set it to the steps to train")`` says
    ``num_steps: 0 must be at least 1; set it to the steps to train``.
    """
    if not condition:
        raise InputError(key, value, must, remedy)


def raise_all(problems: Sequence[InputError]) -> None:
    """Raise the mistakes found: nothing for none, a single one as itself, several as one error."""
    if problems:
        raise InputErrors(problems) if len(problems) > 1 else problems[0]


@contextlib.contextmanager
def exits_raise() -> Iterator[None]:
    """Let code of the user's raise SystemExit where it would end the run without a word.

    That is at ``os._exit``, and at a KeyboardInterrupt that no Ctrl-C has caused. A process that
    the code forks ends as it does elsewhere.
    """
    end_process = os._exit
    here = os.getpid()

    def raise_exit(code: int) -> NoReturn:
        if os.getpid() != here:
            end_process(code)
        raise SystemExit(f"os._exit({code})")

    os._exit = raise_exit  # type: ignore[assignment]
    try:
        yield
    except KeyboardInterrupt as error:
        if not _is_of_statement(error):
            raise
        raise SystemExit(f"KeyboardInterrupt: {error}") from None
    finally:
        os._exit = end_process


def _is_of_statement(error: BaseException) -> bool:
    """Whether a ``raise`` has raised it; Ctrl-C strikes between statements."""
    step = error.__traceback__
    assert step is not None
    while step.tb_next is not None:
        step = step.tb_next
    instruction = step.tb_frame.f_code.co_code[step.tb_lasti]
    return dis.opname[instruction] == "RAISE_VARARGS"


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return a hint for the end of a message: the closest choices, or some of those there are."""
    choices = sorted(set(choices))
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.7)
    if close:
        quoted = " or ".join(repr(choice) for choice in close)
        return f"did you mean {quoted}?"
    if not choices:
        return ""
    ending = ", ..." if len(choices) > 12 else "."
    return f"there are: {', '.join(choices[:12])}{ending}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; empty if it has none."""
    first, *_ = str(error).splitlines() or [""]
    return first


def printable(text: str) -> str:
    """Return a text in one line that no terminal takes for a command: others may have written it.

    Line breaks, control characters and half surrogate pairs become escapes as in Python.
    """
    if text.isprintable():
        return text
    shown = ""
    for character in text:
        shown += character if character.isprintable() else _escape(character)
    return shown


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def show(value: Any, max_length: int = _MAX_VALUE_LENGTH) -> str:
    """Return a value's ``repr`` for a message, cut to a length in characters."""
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4,300 digits, or code of the user's
        text = f"<{type(value).__name__}>"
    if len(text) <= max_length:
        return text
    return f"{text[:max_length]}..."
