"""Messages from a reward worker to the pool: one JSON value a line, of bounded length.

Code runs in a worker that the trainer must not trust with more than a number: a pickle from there
could run anything in the trainer. The other direction, from the pool to its workers, may be
pickled.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gspo.errors import NO_VALUE, InputError

MAX_LINE_BYTES = 65_536  # an outcome holds a number or a text of at most 500 characters
FAILURES = ("raised", "timed_out", "died", "nonfinite")
_READ_BYTES = 65_536
_REFUSAL_LENGTH = 2000  # characters

Call = tuple[int, int]  # number of the item, number of the reward


class BadMessage(Exception):
    """A worker wrote something that is not a message."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a call: a finite value, or a kind of failure and its cause."""

    value: float = 0.0
    failure: str = ""  # one of FAILURES
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Loading:
    """The start of a reward's import in a worker."""

    reward: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The end of all imports in a worker, with the largest value of each reward."""

    max_values: list[float]


def write_loading(reward: int) -> list[Any]:
    """Return the message that a worker is about to import a reward, by its number."""
    return ["loading", reward]


def write_ready(max_values: list[float]) -> list[Any]:
    """Return the message that a worker waits for calls."""
    return ["ready", max_values]


def write_refusal(error: InputError) -> list[Any]:
    """Return the message that a worker does not start, because of an error in a reward."""
    text = str(error).removeprefix(f"{error.key}: ")
    return ["refused", error.key, text[:_REFUSAL_LENGTH]]


def read_greeting(message: Any, num_rewards: int) -> Loading | Ready:
    """Return what a worker says before it takes calls.

    Raises:
        InputError: A reward is not usable.
        BadMessage: The message is none of these.
    """
    match message:
        case ["loading", int(reward)] if 0 <= reward < num_rewards:
            return Loading(reward)
        case ["refused", str(key), str(must)] if must:
            raise InputError(key, NO_VALUE, must)
        case ["ready", list(values)] if len(values) == num_rewards:
            outcomes = [_checked_outcome("", value) for value in values]
            max_values = [outcome.value for outcome in outcomes if outcome is not None]
            if len(max_values) == num_rewards:
                return Ready(max_values)
    beginning = str(message)[:80]
    raise BadMessage(f"it wrote {beginning!r} before it was ready")


def write_outcome(call: Call, outcome: Outcome) -> list[Any]:
    """Return the message of a call's outcome."""
    item, reward = call
    content = outcome.cause if outcome.failure else outcome.value
    return [item, reward, outcome.failure, content]


def read_outcome(message: Any, call: Call | None) -> Outcome:
    """Return the outcome in a message that answers ``call``; None where none waits for an answer.

    Raises:
        BadMessage: The message is not such an answer.
    """
    match message:
        case [int(item), int(reward), str(failure), content] if (item, reward) == call:
            outcome = _checked_outcome(failure, content)
        case _:
            outcome = None
    if outcome is None:
        raise BadMessage(f"it wrote {str(message)[:80]!r}, which answers no call of its")
    return outcome


def _checked_outcome(failure: str, content: Any) -> Outcome | None:
    if failure in FAILURES and isinstance(content, str):
        return Outcome(failure=failure, cause=content)
    if failure == "" and isinstance(content, int | float):
        try:
            value = float(content)
        except OverflowError:  # an integer that no float holds
            return None
        if math.isfinite(value):
            return Outcome(value)
    return None


def send_lines(channel: socket.socket, messages: Iterable[Any]) -> None:
    """Send JSON values, each as a line."""
    text = "".join(json.dumps(message) + "\n" for message in messages)
    channel.sendall(text.encode())


class LineReader:
    """A collector of bytes from a socket that gives the whole lines among them as JSON values.

    Args:
        channel: the socket; reading never waits for it.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._pending = b""

    def read(self) -> list[Any]:
        """Return the messages that have arrived whole.

        Raises:
            EOFError: The other end has closed the socket.
            BadMessage: A line is too long or is not JSON.
        """
        try:
            received = self._channel.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not received:
            raise EOFError
        *lines, self._pending = (self._pending + received).split(b"\n")
        if len(self._pending) > MAX_LINE_BYTES:
            raise BadMessage(f"it wrote {len(self._pending)} bytes without an end of line")
        return [_parse(line) for line in lines]


def _parse(line: bytes) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise BadMessage(f"it wrote a line of {len(line)} bytes")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"it wrote {line[:80]!r}, which is not JSON") from error
