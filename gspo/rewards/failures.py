"""The watch over rewards that fail so often that nothing can be learned from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from gspo.errors import NO_VALUE, InputError

NUM_SCORES = 3  # that count: those of long ago do not hide a reward that has broken since
MIN_CALLS = 8  # a share of fewer says little, so more scores count where these are small


@dataclass(frozen=True, slots=True)
class Tally:
    """The calls of one reward in one ``score`` of the pool."""

    num_calls: int
    num_failures: int
    first_cause: str = ""


class FailureWatch:
    """A count of each reward's failed calls over the last scores of a pool.

    Args:
        max_share: the largest share of failed calls that a reward may have; 1 allows all.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._tallies: dict[str, deque[Tally]] = {}

    def add(self, name: str, tally: Tally) -> None:
        """Count the calls of a score; one of no calls tells nothing.

        Raises:
            InputError: Too many of the reward's last calls have failed.
        """
        if tally.num_calls == 0:
            return
        tallies = self._tallies.setdefault(name, deque())
        tallies.append(tally)
        _forget_old(tallies)
        num_calls = _count_calls(tallies)
        num_failures = sum(tally.num_failures for tally in tallies)
        if num_calls < MIN_CALLS or num_failures <= self._max_share * num_calls:
            return
        cause = _first_cause(tallies)
        share = num_failures / num_calls
        must = (
            f"{num_failures} of its last {num_calls} calls have failed ({share:.0%}), more than "
            f"reward_pool.max_failure_share ({self._max_share:g}) allows; the first {cause}"
        )
        remedy = "correct the reward or its options, or set max_failure_share: 1 to go on"
        raise InputError(f"rewards.{name}", NO_VALUE, must, remedy)


def _forget_old(tallies: deque[Tally]) -> None:
    """Drop the oldest scores while those that stay are enough."""
    while len(tallies) > NUM_SCORES:
        oldest = tallies[0]
        if _count_calls(tallies) - oldest.num_calls < MIN_CALLS:
            return
        tallies.popleft()


def _count_calls(tallies: Iterable[Tally]) -> int:
    return sum(tally.num_calls for tally in tallies)


def _first_cause(tallies: Iterable[Tally]) -> str:
    causes = [tally.first_cause for tally in tallies if tally.num_failures]
    return causes[0]
