"""The inside of a reward worker: one process, one connection to the pool, one call after another.

A worker is a fresh interpreter and not a multiprocessing child: those import the parent's main
script again, which here is a recipe that loads torch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import pickle
import signal
import socket
import time
from typing import Any, BinaryIO

from gspo.errors import InputError
from gspo.rewards.reward import RewardFunction, parse_reward, resolve
from gspo.rewards.wire import (
    Call,
    Outcome,
    send_lines,
    write_loading,
    write_outcome,
    write_ready,
    write_refusal,
)

Item = tuple[str, str, "str | None", dict[str, Any]]  # prompt, completion, answer, metadata

# A result waits this long for others before it is sent: the sign of life that the pool counts on.
FLUSH_SECONDS = 0.5
# The alarm fires again after this long: a bare `except:` in a reward would swallow a single one.
_ALARM_AGAIN_SECONDS = 1.0


class _TimeUp(BaseException):
    """The time limit, which a reward's own ``except Exception`` lets through."""


def main(file_descriptor: int) -> None:
    """Answer the pool's messages until it goes away."""
    # The descriptor was inherited. A program that a reward starts must not get it: it could answer
    # in our place.
    os.set_inheritable(file_descriptor, False)
    # A manager of jobs may send it to all processes; the pool ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # OSError: a reward has closed the socket, which the pool sees as the end of this process.
    with contextlib.suppress(EOFError, OSError):
        _serve(socket.socket(fileno=file_descriptor))


def _serve(channel: socket.socket) -> None:
    from_pool = channel.makefile("rb")
    entries, timeout = _receive(from_pool)
    functions: list[RewardFunction] = []
    max_values: list[float] = []
    for number, (name, entry) in enumerate(entries):
        # Said before: an import may end this process, and the pool then knows whose it was.
        send_lines(channel, [write_loading(number)])
        try:
            reward = parse_reward(name, entry)
        except InputError as error:
            send_lines(channel, [write_refusal(error)])
            return
        function = resolve(reward.path)
        functions.append(functools.partial(function, **reward.options))
        max_values.append(reward.max_value)
    send_lines(channel, [write_ready(max_values)])
    while True:
        items, calls = _receive(from_pool)
        _answer(channel, functions, items, calls, timeout)


def _receive(from_pool: BinaryIO) -> Any:
    """Return the pool's next message.

    Raises:
        EOFError: The pool has gone, or a reward has read from the socket or altered it.
    """
    try:
        return pickle.load(from_pool)
    except Exception as error:
        raise EOFError from error


def _answer(
    channel: socket.socket,
    functions: list[RewardFunction],
    items: dict[int, Item],
    calls: list[Call],
    timeout: float,
) -> None:
    messages: list[Any] = []
    last_sent = time.monotonic()
    for item, reward in calls:
        outcome = _call(functions[reward], items[item], timeout)
        messages.append(write_outcome((item, reward), outcome))
        now = time.monotonic()
        if now - last_sent > FLUSH_SECONDS:
            send_lines(channel, messages)
            messages = []
            last_sent = time.monotonic()
    send_lines(channel, messages)


def _call(function: RewardFunction, item: Item, timeout: float) -> Outcome:
    try:
        return _checked(_call_in_time(function, item, timeout))
    except _TimeUp:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return Outcome(failure="timed_out", cause=f"took more than {timeout:g} s")
    except BaseException as error:  # SystemExit too: one reward must not end the worker
        kind = type(error).__name__
        cause = f"{kind}: {error}"
        return Outcome(failure="raised", cause=cause[:500])


def _call_in_time(function: RewardFunction, item: Item, timeout: float) -> Any:
    worker = os.getpid()
    # Each time, since a reward may have put its own handler there.
    signal.signal(signal.SIGALRM, _raise_time_up)
    signal.setitimer(signal.ITIMER_REAL, timeout, _ALARM_AGAIN_SECONDS)
    try:
        return function(*item)
    finally:
        if os.getpid() != worker:
            # A child that the reward forked came back: it must not answer in the worker's place.
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _checked(value: Any) -> Outcome:
    if not hasattr(value, "__float__"):
        kind = type(value).__name__
        raise TypeError(f"returned {value!r}, a {kind}; a reward is a number")
    number = float(value)
    if not math.isfinite(number):
        return Outcome(failure="nonfinite", cause=f"returned {number}")
    return Outcome(number)


def _raise_time_up(signal_number: int, frame: Any) -> None:
    raise _TimeUp
