"""The process between the trainer and a reward worker, which leaves nobody behind.

A worker is the leader of its own process group, and the programs that its rewards start are in it.
The guard ends the whole group when the worker ends in any way, when the pool asks for it by
SIGTERM, and, on Linux, when the trainer is gone, killed or not. It runs no reward, so it always
answers; a worker may be deaf to all but SIGKILL.

Not here: a program that leaves the group, as a daemon does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_SIGNALS = {signal.SIGTERM, signal.SIGCHLD}


def fork_worker(file_descriptor: int, trainer: int) -> None:
    """Fork the worker and return in it alone; this process becomes its guard, and never returns.

    Args:
        file_descriptor: the worker's socket to the pool, which the guard must not hold open.
        trainer: process id of the parent.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they wait for sigwait
    end_with_parent(trainer, signal.SIGTERM)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        os.setpgid(0, 0)
        end_with_parent(guard, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return
    os.close(file_descriptor)
    with contextlib.suppress(PermissionError, ProcessLookupError):  # it was faster, or is gone
        os.setpgid(worker, worker)
    exit_code = _wait(worker)
    os._exit(exit_code)


def end_with_parent(parent: int, signal_number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the thread that started it ends.

    Args:
        parent: the process id that the parent must have; if it has ended before, so does this one.
        signal_number: the signal.
    """
    if sys.platform == "linux":
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        if library.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "prctl")
    if os.getppid() != parent:
        os._exit(1)


def _wait(worker: int) -> int:
    """Wait until the worker has ended, or has to; end its group, and return its exit code."""
    ended = 0
    while not ended:
        if signal.sigwait(_SIGNALS) == signal.SIGTERM:
            _kill_group(worker)
        ended, status = os.waitpid(worker, os.WNOHANG)
    _kill_group(worker)
    exit_code = os.waitstatus_to_exitcode(status)
    return exit_code if exit_code >= 0 else 128 - exit_code  # a signal, as shells tell it


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # nobody is in it
        os.killpg(leader, signal.SIGKILL)
