"""A pool of processes that scores completions, in which one bad reward call costs that call and nothing else.

The worker enforces the time limit by an alarm. Where that cannot help (C code that never returns, blocked signals, a
process that dies), the pool notices the silence or the closed connection, ends the process, starts another, and gives
it the unanswered calls again one by one, so that only the culprit fails.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import wait
from typing import Any

from gspo.errors import InputError, did_you_mean
from gspo.rewards.wire import BadMessage, LineReader
from gspo.rewards.worker import FLUSH_SECONDS, Call, Item, resolve

logger = logging.getLogger(__name__)

FAILURES = ("raised", "timed_out", "died", "nonfinite")
KILL_AFTER_SECONDS = 2.0  # how long past its time limit a call may keep silent
START_SECONDS = 120.0  # how long a worker may take to import its rewards
SEND_SECONDS = 30.0  # how long an idle worker may take to receive its calls
CHUNKS_PER_WORKER = 4  # more balance the load better, fewer cost fewer messages


@dataclass(frozen=True)
class Reward:
    """One entry of the ``rewards`` section of a config."""

    name: str
    path: str
    weight: float
    options: dict[str, Any]
    max_value: float  # the function's ``max_value`` attribute, 1 where it has none


@dataclass
class RewardResult:
    """What :meth:`RewardPool.score` gives, one entry per item."""

    rewards: list[dict[str, float]]  # by name, before weights; 0 where the call failed
    totals: list[float]  # weighted sums
    failed: list[bool]  # True where any of the item's calls failed
    failures: dict[str, int]  # calls by kind: "raised", "timed_out", "died", "nonfinite"


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    reader: LineReader
    deadline: (
        float  # time.monotonic() by which it must have sent a message, while it starts or has calls
    )
    ready: bool = False
    calls: list[Call] = field(default_factory=list)  # given and not yet answered


class RewardPool:
    """Runs named, weighted reward functions in worker processes that do not load torch.

    Workers start at construction, side by side, and import while the caller goes on; :meth:`warm` waits for them.
    A reward call that raises, passes its time limit, takes its process down or returns something other than a finite
    number is a failure: it is counted, the first of each kind per reward is logged, and its value is 0.

    Args:
        rewards: by name, a mapping with ``function`` (dotted path), ``weight`` (default 1) and the function's options.
            A function may carry an attribute ``max_value``, the largest value it returns where that is not 1.
        num_workers: processes.
        timeout: seconds that one call of one reward may take.
        on_failure: ``zero``, or ``error`` to raise InputError at the first failure.

    Raises:
        InputError: a reward or a knob is not usable; the message names its key.
    """

    def __init__(
        self,
        rewards: Mapping[str, Mapping[str, Any]],
        *,
        num_workers: int = 2,
        timeout: float = 10.0,
        on_failure: str = "zero",
    ) -> None:
        if type(num_workers) is not int or num_workers < 1:
            raise InputError(
                f"reward_pool.num_workers: {num_workers!r} must be a whole number of 1 or more"
            )
        if not (math.isfinite(timeout) and timeout > 0):
            raise InputError(f"reward_pool.timeout: {timeout} must be a number of seconds above 0")
        if on_failure not in ("zero", "error"):
            raise InputError(f"reward_pool.on_failure: {on_failure!r} must be 'zero' or 'error'")
        if not rewards:
            raise InputError(
                "rewards: there is none; name at least one, e.g. {correct: {function: my_file.reward}}"
            )
        self.rewards = [_parse_reward(name, spec) for name, spec in rewards.items()]
        self._timeout = timeout
        self._on_failure = on_failure
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._logged: set[tuple[int, str]] = set()
        self._suspects: set[Call] = set()  # calls that were with a worker when it was lost
        self._workers: list[_Worker] = []
        # A finalizer instead of __del__: it runs at interpreter exit too, once, and does not keep the pool alive.
        self.close = weakref.finalize(self, _stop, self._workers)
        for _ in range(num_workers):
            self._start_worker()

    @property
    def full_reward(self) -> float:
        """The weighted total of a completion with nothing left to gain."""
        return sum(reward.weight * reward.max_value for reward in self.rewards if reward.weight > 0)

    def warm(self) -> None:
        """Wait until every worker has imported its rewards.

        Raises:
            InputError: a worker cannot.
        """
        with self._lock:
            while not all(worker.ready for worker in self._workers):
                self._exchange({})

    def score(self, items: Sequence[Item]) -> RewardResult:
        """Score ``(prompt, completion, answer, metadata)`` items, whose metadata are plain picklable values.

        Returns in bounded time whatever the rewards do: at worst, where every call hangs beyond the reach of the
        alarm, in about ``timeout + 2.5`` seconds times the calls per worker.

        Raises:
            InputError: a call failed and ``on_failure`` is ``error``, or a worker cannot start.
        """
        outcomes: dict[Call, tuple[str, Any]] = {}
        with self._lock:
            self._replace_unusable()
            self._suspects.clear()
            queue = deque(self._chunks(len(items)))
            while queue or any(worker.calls for worker in self._workers):
                for worker in self._workers:
                    if queue and worker.ready and not worker.calls:
                        self._send(worker, queue.popleft(), items)
                queue.extend(self._exchange(outcomes))
        return self._result(items, outcomes)

    def _chunks(self, num_items: int) -> list[list[Call]]:
        size = max(1, math.ceil(num_items / (self._num_workers * CHUNKS_PER_WORKER)))
        calls = [
            [(item, reward) for reward in range(len(self.rewards))] for item in range(num_items)
        ]
        return [
            list(chain.from_iterable(calls[start : start + size]))
            for start in range(0, num_items, size)
        ]

    def _start_worker(self) -> None:
        if not self.close.alive:
            raise RuntimeError("the reward pool is closed")
        ours, theirs = socket.socketpair()
        ours.settimeout(SEND_SECONDS)
        # sys.path is handed over in the code and not in PYTHONPATH, which programs that a reward runs would inherit.
        code = f"import sys; sys.path[:] = {sys.path!r}; from gspo.rewards.worker import main; main({theirs.fileno()})"
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        _post(ours, ([(reward.path, reward.options) for reward in self.rewards], self._timeout))
        self._workers.append(
            _Worker(process, ours, LineReader(ours), deadline=time.monotonic() + START_SECONDS)
        )

    def _replace(self, worker: _Worker) -> int:
        """End the worker, start another, and give the exit code."""
        self._workers.remove(worker)
        exit_code = _stop([worker])
        self._start_worker()
        return exit_code

    def _replace_unusable(self) -> None:
        """Workers that died while idle, or still hold calls of a ``score`` that was interrupted."""
        for worker in list(self._workers):
            if worker.process.poll() is not None or worker.calls:
                self._replace(worker)

    def _send(self, worker: _Worker, calls: list[Call], items: Sequence[Item]) -> None:
        worker.calls = calls
        worker.deadline = self._silent_until()
        _post(worker.channel, ({item: items[item] for item, _ in calls}, calls))

    def _silent_until(self) -> float:
        return time.monotonic() + FLUSH_SECONDS + self._timeout + KILL_AFTER_SECONDS

    def _exchange(self, outcomes: dict[Call, tuple[str, Any]]) -> list[list[Call]]:
        """Wait for messages or a deadline, take what came into ``outcomes``, and give the calls to be sent again."""
        watched = [worker for worker in self._workers if worker.calls or not worker.ready]
        seconds = min(worker.deadline for worker in watched) - time.monotonic()
        readable = wait([worker.channel for worker in watched], timeout=max(seconds, 0.0))
        again: list[list[Call]] = []
        for worker in watched:
            lost = self._receive(worker, outcomes) if worker.channel in readable else None
            if lost is None and time.monotonic() > worker.deadline:
                lost = (
                    "timed_out",
                    f"did not react to its time limit of {self._timeout:g} s; its process was ended",
                )
            if lost is not None:
                again += self._lose(worker, *lost, outcomes)
        return again

    def _receive(
        self, worker: _Worker, outcomes: dict[Call, tuple[str, Any]]
    ) -> tuple[str, str] | None:
        """Take the messages that a worker has sent; give the kind and cause of failure of a worker that is lost."""
        try:
            for message in worker.reader.read():
                self._take(worker, message, outcomes)
        except (EOFError, OSError):
            return "died", "its process ended"
        except BadMessage as error:
            return "died", f"{error}; its process was ended"
        return None

    def _take(self, worker: _Worker, message: Any, outcomes: dict[Call, tuple[str, Any]]) -> None:
        if not worker.ready:
            if isinstance(message, str):
                raise InputError(f"rewards: a worker cannot start: {message}")
            if message is not None:
                raise BadMessage(f"it wrote {str(message)[:80]!r} before it was ready")
            worker.ready = True
            return
        kind, value = _outcome(message, worker.calls)
        outcomes[worker.calls.pop(0)] = (kind, value)  # answers come in the order of the calls
        worker.deadline = self._silent_until()

    def _lose(
        self, worker: _Worker, kind: str, why: str, outcomes: dict[Call, tuple[str, Any]]
    ) -> list[list[Call]]:
        """Replace a worker; give the calls to be sent again, or put down the outcome of a lone culprit."""
        if not worker.ready:
            how = why if kind == "died" else f"it was not ready after {START_SECONDS:g} s"
            raise InputError(
                f"rewards: a worker cannot start: {how}; import the modules of your rewards by hand"
            )
        exit_code = self._replace(worker)
        first_time = self._suspects.isdisjoint(worker.calls)
        self._suspects.update(worker.calls)
        # A lone call that dies is tried once more: its worker may have been killed for another reason, or while idle.
        if len(worker.calls) > 1 or (kind == "died" and first_time):
            return [[call] for call in worker.calls]
        if why == "its process ended":
            why += f" with exit code {exit_code}"
        outcomes[worker.calls[0]] = (kind, why)
        return []

    def _result(self, items: Sequence[Item], outcomes: dict[Call, tuple[str, Any]]) -> RewardResult:
        result = RewardResult([], [], [], dict.fromkeys(FAILURES, 0))
        failures: Counter[str] = Counter()
        for item in range(len(items)):
            values: dict[str, float] = {}
            total, failed = 0.0, False
            for index, reward in enumerate(self.rewards):
                kind, value = outcomes[item, index]
                if kind:
                    self._report(index, kind, value, items[item])
                    failures[kind] += 1
                    value, failed = 0.0, True
                values[reward.name] = value
                total += reward.weight * value
            result.rewards.append(values)
            result.totals.append(total)
            result.failed.append(failed)
        result.failures.update(failures)
        return result

    def _report(self, index: int, kind: str, why: str, item: Item) -> None:
        message = f"rewards.{self.rewards[index].name}: {self.rewards[index].path} {kind.replace('_', ' ')}: {why}"
        if self._on_failure == "error":
            raise InputError(f"{message}, on the completion {item[1][:200]!r}")
        if (index, kind) not in self._logged:
            self._logged.add((index, kind))
            logger.warning(
                "%s. The value is 0; more of this kind are counted and not logged.", message
            )


def _outcome(message: Any, calls: Sequence[Call]) -> tuple[str, Any]:
    """Check a worker's answer to the first of its calls; give its kind ("" for a value) and its value or text.

    Raises:
        BadMessage: The message is not such an answer.
    """
    match message:
        case [int(item), int(reward), "", int() | float() as value] if (
            calls and (item, reward) == calls[0]
        ):
            if math.isfinite(value):
                return "", float(value)
        case [int(item), int(reward), str(kind), str(text)] if calls and (item, reward) == calls[0]:
            if kind in FAILURES:
                return kind, text
    raise BadMessage(f"it wrote {str(message)[:80]!r}, which answers no call of its")


def _post(channel: socket.socket, message: Any) -> None:
    """Send a message to a worker. One that does not receive it is cut off, and reads as dead from then on."""
    try:
        channel.sendall(pickle.dumps(message))
    except OSError:
        with contextlib.suppress(OSError):
            channel.shutdown(socket.SHUT_RDWR)


def _stop(workers: list[_Worker]) -> int:
    """End the processes; the exit code of the last, as it was if it had ended by itself."""
    exit_code = 0
    for worker in workers:
        worker.channel.close()  # an idle worker ends at this
    for worker in workers:
        try:
            exit_code = worker.process.wait(0.2)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            exit_code = worker.process.wait()
    return exit_code


def _parse_reward(name: str, spec: Mapping[str, Any]) -> Reward:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("function"), str):
        raise InputError(
            f"rewards.{name}: {spec!r} needs a function, a dotted path like gspo.rewards.exact_match"
        )
    options = dict(spec)
    path, weight = options.pop("function"), options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise InputError(f"rewards.{name}.weight: {weight!r} must be a finite number")
    try:
        function = resolve(path)
        signature = inspect.signature(function)
    except ValueError as error:  # InputError is one; the other is of a builtin without a signature
        missing = isinstance(error.__cause__, ModuleNotFoundError)
        hint = (
            f"; looked in {os.getcwd()}: run from the file's folder or set PYTHONPATH"
            if missing
            else ""
        )
        raise InputError(f"rewards.{name}.function: {error}{hint}") from error
    _check_options(name, path, signature, options)
    return Reward(name, path, float(weight), options, float(getattr(function, "max_value", 1.0)))


def _check_options(
    name: str, path: str, signature: inspect.Signature, options: Mapping[str, Any]
) -> None:
    try:
        signature.bind("", "", None, {}, **options)
        return
    except TypeError as error:
        reason = str(error)
    parameters = list(signature.parameters.values())
    known = [p.name for p in parameters[4:]]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for option in options:
            if option not in known:
                hint = did_you_mean(option, [*known, "weight"])
                raise InputError(f"rewards.{name}.{option}: {path} has no such option.{hint}")
    for parameter in parameters[4:]:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise InputError(f"rewards.{name}.{parameter.name}: {path} needs this option")
    raise InputError(
        f"rewards.{name}.function: {path}{signature} must take (prompt, completion, answer, metadata): {reason}"
    )
