"""What runs inside a reward worker: one process, one connection to the pool, rewards called one after another.

A worker is a fresh interpreter and not a multiprocessing child: those import the parent's main script again, which
here is a recipe that loads torch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from gspo.errors import InputError, did_you_mean
from gspo.rewards.wire import send_lines

RewardFunction = Callable[..., float]
Item = tuple[str, str, "str | None", dict[str, Any]]  # prompt, completion, answer, metadata
Call = tuple[int, int]  # item, reward
Outcome = tuple[
    int, int, str, Any
]  # item, reward, "" and its value or the kind of failure and its text

FLUSH_SECONDS = 0.5  # how long a result may wait for others before it is sent, the sign of life that the pool counts on


class _TimeUp(BaseException):
    """The time limit. Not an Exception, so that a reward's own ``except Exception`` lets it through."""


def resolve(path: str) -> RewardFunction:
    """The function that a dotted path names; modules in the current directory can be named too.

    Raises:
        InputError: there is no such module or name, its import fails, or it cannot be called.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise InputError(
            f"{path!r} is not a dotted path, as gspo.rewards.exact_match or my_file.reward are"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name, None)
    except Exception as error:
        raise InputError(f"{path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if function is None:
        names = getattr(module, "__all__", None) or [
            n for n in vars(module) if not n.startswith("_")
        ]
        raise InputError(f"{module_name} has no {name!r}.{did_you_mean(name, names)}")
    if not callable(function):
        raise InputError(f"{path!r} is a {type(function).__name__}, not a function")
    return function


def main(file_descriptor: int) -> None:
    """Answer the pool's messages until it goes away."""
    # The descriptor was inherited. A program that a reward starts must not get it: it could answer in our place.
    os.set_inheritable(file_descriptor, False)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole process group; the pool ends its workers
    with contextlib.suppress(EOFError, ConnectionError):
        _serve(socket.socket(fileno=file_descriptor))


def _serve(channel: socket.socket) -> None:
    from_pool = channel.makefile("rb")
    rewards, timeout = pickle.load(from_pool)
    try:
        functions: list[RewardFunction] = [
            functools.partial(resolve(path), **options) for path, options in rewards
        ]
    except InputError as error:
        send_lines(channel, [str(error)[:2000]])
        return
    send_lines(channel, [None])
    while True:
        items, calls = pickle.load(from_pool)
        _answer(channel, functions, items, calls, timeout)


def _answer(
    channel: socket.socket,
    functions: list[RewardFunction],
    items: dict[int, Item],
    calls: list[Call],
    timeout: float,
) -> None:
    outcomes: list[Outcome] = []
    last_sent = time.monotonic()
    for item, reward in calls:
        outcomes.append((item, reward, *_call(functions[reward], items[item], timeout)))
        if time.monotonic() - last_sent > FLUSH_SECONDS:
            send_lines(channel, outcomes)
            outcomes, last_sent = [], time.monotonic()
    send_lines(channel, outcomes)


def _call(function: RewardFunction, item: Item, timeout: float) -> tuple[str, Any]:
    worker = os.getpid()
    try:
        signal.signal(
            signal.SIGALRM, _raise_time_up
        )  # each time, since a reward may have put its own handler there
        # It fires again every second: a bare `except:` in the reward would swallow a single one.
        signal.setitimer(signal.ITIMER_REAL, timeout, 1.0)
        try:
            value = function(*item)
        finally:
            if os.getpid() != worker:
                os._exit(
                    0
                )  # a child that the reward forked came back: it must not answer in the worker's place
            signal.setitimer(signal.ITIMER_REAL, 0)
        return _checked(value)
    except _TimeUp:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return "timed_out", f"took more than {timeout:g} s"
    except BaseException as error:  # SystemExit too: one reward must not end the worker
        return "raised", f"{type(error).__name__}: {error}"[:500]


def _checked(value: Any) -> tuple[str, Any]:
    if not hasattr(value, "__float__"):
        raise TypeError(f"returned {value!r}, a {type(value).__name__}; a reward is a number")
    number = float(value)
    return ("", number) if math.isfinite(number) else ("nonfinite", f"returned {number}")


def _raise_time_up(signal_number: int, frame: Any) -> None:
    raise _TimeUp
