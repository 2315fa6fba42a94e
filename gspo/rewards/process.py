"""A worker process as the reward pool sees it.

Not here: what the process runs (:mod:`gspo.rewards.worker`), and what becomes of the calls of a
worker that is lost (:mod:`gspo.rewards.pool`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from gspo.rewards.wire import BadMessage, Call, LineReader
from gspo.rewards.worker import FLUSH_SECONDS, Item

KILL_AFTER_SECONDS = 2.0  # how long past its time limit a call may keep silent
START_SECONDS = 120.0  # how long a worker may take to import its rewards
SEND_SECONDS = 30.0  # how long an idle worker may take to receive its calls
STOP_SECONDS = 0.2  # how long a worker may take to end by itself
GUARD_SECONDS = 5.0  # how long its guard may take to end it

# A process ends with the thread that started it (:mod:`gspo.rewards.guard`). One that calls the
# pool, such as a prefetching one, may end long before the pool; this one ends with the trainer.
_starter = ThreadPoolExecutor(1, thread_name_prefix="reward-workers")

ENDED = "its process ended"


class WorkerLost(Exception):
    """A worker ended, wrote nonsense or kept silent for too long.

    Args:
        failure: the kind of failure of the call that it was at.
        cause: in words.
    """

    def __init__(self, failure: str, cause: str) -> None:
        super().__init__(failure, cause)
        self.failure = failure
        self.cause = cause


@dataclass(eq=False)
class WorkerProcess:
    """A process, the socket to it, and the calls that it has been given."""

    process: subprocess.Popen[bytes]  # the guard, which ends as the worker does
    channel: socket.socket
    timeout: float  # seconds for one call
    reader: LineReader
    # time.monotonic() by which it must have sent a message, while it starts or has calls
    deadline: float
    ready: bool = False
    loading: int | None = None  # number of the reward that it imports, or imported last
    calls: list[Call] = field(default_factory=list)  # given and not yet answered

    @classmethod
    def start(
        cls, entries: Sequence[tuple[str, Mapping[str, Any]]], timeout: float
    ) -> WorkerProcess:
        """Start a process that imports the rewards while the caller goes on.

        Args:
            entries: the rewards' names and entries, read and not imported.
            timeout: seconds for one call.
        """
        ours, theirs = socket.socketpair()
        ours.settimeout(SEND_SECONDS)
        # sys.path is handed over in the code and not in PYTHONPATH, which programs that a reward
        # runs would inherit.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from gspo.rewards.guard import fork_worker; "
            f"fork_worker({theirs.fileno()}, {os.getpid()}); "
            f"from gspo.rewards.worker import main; main({theirs.fileno()})"
        )
        command = [sys.executable, "-P", "-c", code]
        process = _starter.submit(_start, command, theirs.fileno()).result()
        theirs.close()
        deadline = time.monotonic() + START_SECONDS
        worker = cls(process, ours, timeout, LineReader(ours), deadline)
        worker._post((entries, timeout))
        return worker

    @property
    def is_awaited(self) -> bool:
        """Whether the worker owes a message."""
        return bool(self.calls) or not self.ready

    @property
    def is_idle(self) -> bool:
        """Whether the worker can be given calls."""
        return self.ready and not self.calls

    @property
    def is_usable(self) -> bool:
        """Whether a worker between two scores is alive and holds no calls of an earlier one."""
        return self.process.poll() is None and not self.calls

    def send(self, calls: list[Call], items: Sequence[Item]) -> None:
        """Give the worker calls; ``items`` are those that the calls count."""
        self.calls = calls
        self.extend_deadline()
        needed = {item: items[item] for item, _ in calls}
        self._post((needed, calls))

    def read(self) -> list[Any]:
        """Return the messages that have arrived, without waiting.

        Raises:
            WorkerLost: The process has ended or wrote something that is no message.
        """
        try:
            return self.reader.read()
        except (EOFError, OSError) as error:
            raise WorkerLost("died", ENDED) from error
        except BadMessage as error:
            raise WorkerLost("died", f"{error}; its process was ended") from error

    def extend_deadline(self) -> None:
        """Give the worker the time of one more call, from now on."""
        seconds = FLUSH_SECONDS + self.timeout + KILL_AFTER_SECONDS
        self.deadline = time.monotonic() + seconds

    def check_deadline(self) -> None:
        """Raise WorkerLost if the worker has kept silent for too long."""
        if time.monotonic() > self.deadline:
            cause = f"did not react to its time limit of {self.timeout:g} s; its process was ended"
            raise WorkerLost("timed_out", cause)

    def _post(self, message: Any) -> None:
        """Send a message. A worker that does not receive it is cut off, and reads as dead then."""
        try:
            self.channel.sendall(pickle.dumps(message))
        except OSError:
            with contextlib.suppress(OSError):
                self.channel.shutdown(socket.SHUT_RDWR)


def _start(command: list[str], file_descriptor: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=[file_descriptor],
        start_new_session=True,  # Ctrl-C is for the trainer, which then closes the pool
    )


def stop(workers: list[WorkerProcess]) -> int:
    """End the processes; return the last one's exit code, its own if it ended by itself."""
    exit_code = 0
    for worker in workers:
        worker.channel.close()  # an idle worker ends at this
    for worker in workers:
        exit_code = _stop_process(worker.process)
    return exit_code


def _stop_process(guard: subprocess.Popen[bytes]) -> int:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return guard.wait(STOP_SECONDS)
    guard.terminate()  # it ends the worker and all that the worker started
    with contextlib.suppress(subprocess.TimeoutExpired):
        return guard.wait(GUARD_SECONDS)
    guard.kill()
    return guard.wait()
