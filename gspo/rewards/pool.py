"""A pool of processes that scores completions, in which one bad call costs that call and no more.

The worker enforces the time limit by an alarm. Where that cannot help (C code that never returns,
blocked signals, a process that dies), the pool notices the silence or the closed connection, ends
the process, starts another, and gives it the unanswered calls again one by one, so that only the
culprit fails.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any, Protocol

from gspo.errors import NO_VALUE, InputError, printable, require
from gspo.rewards.failures import FailureWatch, Tally
from gspo.rewards.process import ENDED, START_SECONDS, WorkerLost, WorkerProcess, stop
from gspo.rewards.reward import Reward, read_reward, reward_problems
from gspo.rewards.wire import (
    FAILURES,
    BadMessage,
    Call,
    Loading,
    Outcome,
    Ready,
    read_greeting,
    read_outcome,
)
from gspo.rewards.worker import Item

logger = logging.getLogger(__name__)

MAX_TIMEOUT = 86_400.0  # seconds; timers overflow at some 1e9
MAX_WORKERS = 1_024
CHUNKS_PER_WORKER = 4  # more balance the load better, fewer cost fewer messages


@dataclass
class RewardResult:
    """The rewards of scored items, one entry per item."""

    rewards: list[dict[str, float]]  # by name, before weights; 0 where the call failed
    totals: list[float]  # weighted sums
    failed: list[bool]  # True where any of the item's calls failed
    failures: dict[str, int]  # calls by kind: "raised", "timed_out", "died", "nonfinite"


class Scorer(Protocol):
    """The part of a :class:`RewardPool` that scoring and evaluation use."""

    rewards: list[Reward]

    @property
    def full_reward(self) -> float:
        """The weighted total of a completion with nothing left to gain."""
        ...

    def score(self, items: Sequence[Item]) -> RewardResult:
        """Score ``(prompt, completion, answer, metadata)`` items, in their order."""
        ...


class RewardPool:
    """Runs named, weighted reward functions in worker processes that do not load torch.

    Workers start at construction, side by side. The first that has imported the rewards ends the
    construction, since an import may do anything, and this process has to survive it; the others
    import while the caller goes on, and :meth:`warm` waits for them. A reward call that raises,
    passes its time limit, takes its process down or returns something other than a finite number is
    a failure: it is counted, the first of each kind per reward is logged, and its value is 0.

    Args:
        rewards: by name, a mapping with ``function`` (dotted path), ``weight`` (default 1) and the
            function's options. A function may carry attributes, see
            :func:`gspo.rewards.reward.parse_reward`.
        num_workers: processes.
        timeout: seconds that one call of one reward may take, up to a day.
        on_failure: ``zero``, or ``error`` to raise InputError at the first failure.
        max_failure_share: share in [0, 1] of a reward's calls in the last scores that may fail,
            beyond which :meth:`score` raises InputError; 1 allows all.

    Raises:
        InputError: A reward or another argument is not usable; the key is the config's in full.
    """

    def __init__(
        self,
        rewards: Mapping[str, Mapping[str, Any]],
        *,
        num_workers: int = 2,
        timeout: float = 10.0,
        on_failure: str = "zero",
        max_failure_share: float = 0.5,
    ) -> None:
        # Unlike other components, which name their own argument, the pool names config keys in
        # full: its arguments are keys of two sections, so no caller can add one section to all.
        _check_arguments(num_workers, timeout, on_failure, max_failure_share)
        for problem in reward_problems(rewards):
            raise problem
        self.rewards = [read_reward(name, entry) for name, entry in rewards.items()]
        self._entries = [(name, dict(entry)) for name, entry in rewards.items()]
        self._watch = FailureWatch(max_failure_share)
        self._timeout = timeout
        self._on_failure = on_failure
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._logged: set[tuple[int, str]] = set()
        self._suspects: set[Call] = set()  # calls that were with a worker when it was lost
        self._workers: list[WorkerProcess] = []
        # A finalizer instead of __del__: it runs at interpreter exit too, once, and does not keep
        # the pool alive.
        self.close = weakref.finalize(self, stop, self._workers)
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise

    @property
    def full_reward(self) -> float:
        """The weighted total of a completion with nothing left to gain."""
        total = 0.0
        for reward in self.rewards:
            if reward.weight > 0:
                total += reward.weight * reward.max_value
        return total

    def warm(self) -> None:
        """Wait until every worker has imported its rewards.

        Raises:
            InputError: A worker cannot.
        """
        with self._lock:
            while not all(worker.ready for worker in self._workers):
                self._exchange({})

    def score(self, items: Sequence[Item]) -> RewardResult:
        """Score ``(prompt, completion, answer, metadata)`` items with plain picklable metadata.

        Returns in bounded time whatever the rewards do: at worst, where every call hangs beyond
        the reach of the alarm, in about ``timeout + 2.5`` seconds times the calls per worker.

        Raises:
            InputError: A call failed and ``on_failure`` is ``error``, more than
                ``max_failure_share`` of a reward's calls failed, or a worker cannot start.
        """
        outcomes: dict[Call, Outcome] = {}
        with self._lock:
            self._replace_unusable()
            self._suspects.clear()
            queue = deque(self._chunks(len(items)))
            while queue or any(worker.calls for worker in self._workers):
                for worker in self._workers:
                    if queue and worker.is_idle:
                        worker.send(queue.popleft(), items)
                queue.extend(self._exchange(outcomes))
            return self._result(items, outcomes)

    def _chunks(self, num_items: int) -> list[list[Call]]:
        """Return all calls in runs of whole items."""
        num_chunks = self._num_workers * CHUNKS_PER_WORKER
        items_per_chunk = math.ceil(num_items / num_chunks)
        size = max(1, items_per_chunk)
        rewards = range(len(self.rewards))
        chunks = []
        for start in range(0, num_items, size):
            end = min(start + size, num_items)
            calls = []
            for item in range(start, end):
                calls += [(item, reward) for reward in rewards]
            chunks.append(calls)
        return chunks

    def _start_all(self) -> None:
        """Start the workers, and wait until one has survived the import of the rewards."""
        for _ in range(self._num_workers):
            self._start_worker()
        while not any(worker.ready for worker in self._workers):
            self._exchange({})

    def _start_worker(self) -> None:
        if not self.close.alive:
            raise RuntimeError("the reward pool is closed")
        worker = WorkerProcess.start(self._entries, self._timeout)
        self._workers.append(worker)

    def _replace(self, worker: WorkerProcess) -> int:
        """End the worker, start another, and return the exit code."""
        self._workers.remove(worker)
        exit_code = stop([worker])
        self._start_worker()
        return exit_code

    def _replace_unusable(self) -> None:
        """Replace workers that died idle, or still hold calls of an interrupted ``score``."""
        for worker in list(self._workers):
            if not worker.is_usable:
                self._replace(worker)

    def _exchange(self, outcomes: dict[Call, Outcome]) -> list[list[Call]]:
        """Wait for messages or a deadline, put down what came, and return the calls to repeat."""
        awaited = [worker for worker in self._workers if worker.is_awaited]
        channels = [worker.channel for worker in awaited]
        deadline = min(worker.deadline for worker in awaited)
        seconds = deadline - time.monotonic()
        readable = wait(channels, timeout=max(seconds, 0.0))
        again: list[list[Call]] = []
        for worker in awaited:
            try:
                if worker.channel in readable:
                    self._receive(worker, outcomes)
                worker.check_deadline()
            except WorkerLost as lost:
                again += self._lose(worker, lost, outcomes)
        return again

    def _receive(self, worker: WorkerProcess, outcomes: dict[Call, Outcome]) -> None:
        """Take the messages that a worker has sent.

        Raises:
            WorkerLost: It has ended, or wrote something that is no answer.
        """
        for message in worker.read():
            try:
                self._take(worker, message, outcomes)
            except BadMessage as error:
                raise WorkerLost("died", f"{error}; its process was ended") from error

    def _take(self, worker: WorkerProcess, message: Any, outcomes: dict[Call, Outcome]) -> None:
        if not worker.ready:
            self._take_greeting(worker, message)
            return
        call = worker.calls[0] if worker.calls else None
        outcome = read_outcome(message, call)
        outcomes[worker.calls.pop(0)] = outcome  # answers come in the order of the calls
        worker.extend_deadline()

    def _take_greeting(self, worker: WorkerProcess, message: Any) -> None:
        greeting = read_greeting(message, len(self.rewards))
        match greeting:
            case Loading():
                worker.loading = greeting.reward
            case Ready():
                worker.ready = True
                pairs = zip(self.rewards, greeting.max_values, strict=True)
                self.rewards = [replace(reward, max_value=value) for reward, value in pairs]

    def _lose(
        self, worker: WorkerProcess, lost: WorkerLost, outcomes: dict[Call, Outcome]
    ) -> list[list[Call]]:
        """Replace a worker; return the calls to repeat, or put down a lone culprit's outcome."""
        if not worker.ready:
            raise self._start_error(worker, lost)
        exit_code = self._replace(worker)
        is_first_loss = self._suspects.isdisjoint(worker.calls)
        self._suspects.update(worker.calls)
        # A lone call that dies is tried once more: its worker may have been killed for another
        # reason, or while idle.
        may_be_innocent = lost.failure == "died" and is_first_loss
        if len(worker.calls) > 1 or may_be_innocent:
            return [[call] for call in worker.calls]
        cause = lost.cause
        if cause == ENDED:
            cause += f" with exit code {exit_code}"
        culprit = worker.calls[0]
        outcomes[culprit] = Outcome(failure=lost.failure, cause=cause)
        return []

    def _start_error(self, worker: WorkerProcess, lost: WorkerLost) -> InputError:
        """End a worker that does not get ready; return the error that names its last reward."""
        exit_code = stop([worker])
        cause = lost.cause
        if lost.failure != "died":
            cause = f"it was not ready after {START_SECONDS:g} s"
        elif cause == ENDED:
            cause = f"{ENDED} with exit code {exit_code}"
        if worker.loading is None:
            return InputError("rewards", NO_VALUE, f"a worker cannot start: {cause}")
        reward = self.rewards[worker.loading]
        must = f"cannot be imported: {cause}"
        module_name, _, _ = reward.path.rpartition(".")
        remedy = f"see what `import {module_name}` does in a python of its own"
        return InputError(f"rewards.{reward.name}.function", reward.path, must, remedy)

    def _result(self, items: Sequence[Item], outcomes: dict[Call, Outcome]) -> RewardResult:
        result = RewardResult([], [], [], dict.fromkeys(FAILURES, 0))
        for number, item in enumerate(items):
            values: dict[str, float] = {}
            total = 0.0
            has_failed = False
            for index, reward in enumerate(self.rewards):
                outcome = outcomes[number, index]
                if outcome.failure:
                    self._report(index, outcome, item)
                    result.failures[outcome.failure] += 1
                    has_failed = True
                values[reward.name] = outcome.value
                total += reward.weight * outcome.value
            result.rewards.append(values)
            result.totals.append(total)
            result.failed.append(has_failed)
        for index, reward in enumerate(self.rewards):
            of_reward = [outcomes[item, index] for item in range(len(items))]
            self._watch.add(reward.name, _tally(of_reward))
        return result

    def _report(self, index: int, outcome: Outcome, item: Item) -> None:
        reward = self.rewards[index]
        key = f"rewards.{reward.name}"
        message = f"{reward.path} {_told(outcome)}"
        if self._on_failure == "error":
            _, completion, _, _ = item
            must = f"{message}, on the completion {completion[:200]!r}"
            raise InputError(key, NO_VALUE, must)
        kind = (index, outcome.failure)
        if kind not in self._logged:
            self._logged.add(kind)
            ending = "The value is 0; more of this kind are counted and not logged."
            logger.warning("%s: %s. %s", key, printable(message), ending)


def _tally(outcomes: Sequence[Outcome]) -> Tally:
    """Count the outcomes of one reward's calls."""
    causes = [_told(outcome) for outcome in outcomes if outcome.failure]
    first_cause = causes[0] if causes else ""
    return Tally(len(outcomes), len(causes), first_cause)


def _told(outcome: Outcome) -> str:
    """Return a failure in words."""
    failure = outcome.failure.replace("_", " ")
    return f"{failure}: {outcome.cause}"


def _check_arguments(
    num_workers: int, timeout: float, on_failure: str, max_failure_share: float
) -> None:
    require(
        type(num_workers) is int and 1 <= num_workers <= MAX_WORKERS,
        "reward_pool.num_workers",
        num_workers,
        f"must be a whole number of 1 or more, at most {MAX_WORKERS:,}",
    )
    require(
        type(timeout) in (int, float) and 0 < timeout <= MAX_TIMEOUT,
        "reward_pool.timeout",
        timeout,
        "must be a number of seconds above 0 and up to 86,400, a day",
    )
    require(
        on_failure in ("zero", "error"),
        "reward_pool.on_failure",
        on_failure,
        "must be 'zero' or 'error'",
    )
    require(
        type(max_failure_share) in (int, float) and 0 <= max_failure_share <= 1,
        "reward_pool.max_failure_share",
        max_failure_share,
        "must be a share from 0 to 1",
    )
