"""Reward functions of a user, good and bad, named by dotted path in the tests of the pool."""

import os
import re
import signal
import sys
import time


def of_metadata(prompt, completion, answer, metadata, *, scale=1.0):
    return scale * metadata["value"]


def described(prompt, completion, answer, metadata):
    return float((prompt, completion, answer, metadata) == ("p", "c", "a", {"k": (1, 2)}))


def by_command(prompt, completion, answer, metadata):
    """Does what the completion says."""
    return COMMANDS[completion]()


def torch_is_loaded(prompt, completion, answer, metadata):
    return float("torch" in sys.modules)


def process_id(prompt, completion, answer, metadata):
    return float(os.getpid())


def needs_an_option(prompt, completion, answer, metadata, *, threshold):
    return threshold


def takes_two(prompt, completion):
    return 1.0


def _raise():
    raise KeyError("no such thing")


def _backtrack():
    return float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))  # in C, for years


def _sleep_deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(600)


def _swallow():
    try:
        time.sleep(600)
    except:  # noqa: E722
        time.sleep(600)


def _tolerate():
    try:
        time.sleep(600)
    except Exception:
        return 1.0


def _slow():
    time.sleep(0.1)
    return 1.0


def _fork():
    if os.fork() == 0:
        return 0.5
    os.wait()
    return 0.25


COMMANDS = {
    "fork": _fork,
    "slow": _slow,
    "tolerate": _tolerate,
    "one": lambda: 1.0,
    "half": lambda: 0.5,
    "true": lambda: True,
    "raise": _raise,
    "exit": lambda: sys.exit(3),
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "none": lambda: None,
    "text": lambda: "1.0",
    "sleep": lambda: time.sleep(600),
    "swallow": _swallow,
    "backtrack": _backtrack,
    "sleep_deaf": _sleep_deaf,
    "die": lambda: os._exit(7),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
