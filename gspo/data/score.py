"""Scoring: the node that gives sampled completions their rewards."""

from __future__ import annotations

import time

from torchdata.nodes import BaseNode

from gspo.data.node import Stateless
from gspo.rewards.pool import RewardPool, RewardResult
from gspo.rewards.worker import Item
from gspo.types import Completion, Group, Rollout

FULL_REWARD_TOLERANCE = 1e-6  # for the rounding of a weighted sum


class Score(Stateless[Rollout]):
    """Fills ``rewards`` and ``reward`` of every completion of a rollout, in one call of the pool.

    A reward function sees the prompt's metadata with two additions: ``num_tokens``, the completion's length, and
    ``finish_reason``, ``"stop"`` or ``"length"``.

    It adds to the rollout's stats, as sums and weights: ``reward/mean`` and ``reward/<name>`` over completions,
    ``_reward_sq`` (the squares, for the standard deviation), ``solved`` (groups with a full reward in them, over
    groups), ``reward_failures`` (reward calls that failed) and ``time/score`` (seconds).
    """

    def __init__(self, source: BaseNode[Rollout], pool: RewardPool) -> None:
        super().__init__(source)
        self._pool = pool

    def next(self) -> Rollout:
        """The source's next rollout, scored."""
        rollout = next(self.source)
        start = time.perf_counter()
        completions = [completion for group in rollout.groups for completion in group.completions]
        result = self._pool.score(reward_items(rollout.groups))
        for completion, rewards, total in zip(
            completions, result.rewards, result.totals, strict=True
        ):
            completion.rewards, completion.reward = rewards, total
        self._add_stats(rollout, completions, result)
        rollout.stats["time/score"] = (time.perf_counter() - start, 1)
        return rollout

    def _add_stats(
        self, rollout: Rollout, completions: list[Completion], result: RewardResult
    ) -> None:
        stats, num = rollout.stats, len(completions)
        full = self._pool.full_reward - FULL_REWARD_TOLERANCE
        stats["reward/mean"] = (sum(result.totals), num)
        stats["_reward_sq"] = (sum(total * total for total in result.totals), num)
        for reward in self._pool.rewards:
            stats[f"reward/{reward.name}"] = (
                sum(values[reward.name] for values in result.rewards),
                num,
            )
        solved = sum(any(c.reward >= full for c in group.completions) for group in rollout.groups)
        stats["solved"] = (solved, len(rollout.groups))
        stats["reward_failures"] = (sum(result.failures.values()), 1)


def reward_items(groups: list[Group]) -> list[Item]:
    """What the pool scores, one entry a completion in the groups' order."""
    return [
        (
            group.prompt.text,
            completion.text,
            group.prompt.answer,
            {
                **group.prompt.metadata,
                "num_tokens": len(completion.tokens),
                "finish_reason": completion.finish_reason,
            },
        )
        for group in groups
        for completion in group.completions
    ]
