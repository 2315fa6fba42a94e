"""Reward functions of a user, good and bad, named by dotted path in the tests of the pool."""

import os
import pickle
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import time


def of_metadata(prompt, completion, answer, metadata, *, scale=1.0):
    return scale * metadata["value"]


def described(prompt, completion, answer, metadata):
    return float((prompt, completion, answer, metadata) == ("p", "c", "a", {"k": (1, 2)}))


def by_command(prompt, completion, answer, metadata):
    """Does what the completion says."""
    if completion == "write_pickle":
        data = pickle.dumps(_RunsCode(metadata["marker"]))
        return _write(
            struct.pack("!i", len(data)) + data
        )  # as multiprocessing's connections frame it
    return COMMANDS[completion]()


def fails_on_a_zero(prompt, completion, answer, metadata):
    """A penalty, and its call fails for one completion."""
    if completion == "0":
        raise ValueError("zero")
    return 0.0


fails_on_a_zero.max_value = 0.0


def leaves_a_program(prompt, completion, answer, metadata):
    """Starts a program in the background, notes who is there, and does what the completion says."""
    program = subprocess.Popen(["sleep", "600"])
    with open(metadata["notes"], "a") as notes:
        notes.write(f"{os.getppid()} {os.getpid()} {program.pid}\n")
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


def _sockets():
    """Descriptors of this process's sockets, of which a worker has the one to the pool."""
    numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    return [
        n
        for n in numbers
        if os.path.exists(f"/proc/self/fd/{n}") and stat.S_ISSOCK(os.fstat(n).st_mode)
    ]


class _RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def _write(data, then=1.0):
    """Writes into the channel to the pool, as code in a worker can."""
    for number in _sockets():
        socket.socket(fileno=os.dup(number)).sendall(data)
    return then


def _program_looks_for_sockets():
    code = (
        "from tests.rewards.sample_rewards import _sockets; import sys; sys.exit(len(_sockets()))"
    )
    assert _sockets(), "the worker itself has one"
    return 1.0 - subprocess.run([sys.executable, "-c", code], close_fds=False).returncode


def _write_for_ever():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    while True:
        _write(b"x")
        time.sleep(0.01)


COMMANDS = {
    "program_looks_for_sockets": _program_looks_for_sockets,
    "write_stray_bytes": lambda: _write(b"\x00\xff stray\n"),
    "write_half_a_line": lambda: _write(b"[0, 0, "),
    "write_wrong_answer": lambda: _write(b'[77, 0, "", 1.0]\n'),
    "write_huge_number": lambda: _write(b'[1, 0, "", 1%s]\n' % (b"0" * 400)),
    "write_for_ever": _write_for_ever,
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


def spoils_socket(prompt, completion, answer, metadata, *, how):
    """Closes, alters or shuts the sockets of this process."""
    for number in range(3, 64):
        try:
            channel = socket.socket(fileno=os.dup(number))
        except OSError:
            continue
        if how == "close":
            os.close(number)
        elif how == "block":
            os.set_blocking(number, False)
        else:
            channel.shutdown(socket.SHUT_RDWR)
        channel.close()
    return 1.0


def raises_commands(prompt, completion, answer, metadata):
    raise ValueError("\x1b[2J\nred")
