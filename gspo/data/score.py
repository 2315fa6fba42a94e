"""Scoring: the node that gives sampled completions their rewards."""

from __future__ import annotations

import time

from torchdata.nodes import BaseNode

from gspo.data.node import TransformNode
from gspo.metrics import Mean, Metrics, Sum, Time
from gspo.rewards.pool import RewardPool, RewardResult
from gspo.rewards.worker import Item
from gspo.types import Completion, Group, GroupBatch

FULL_REWARD_TOLERANCE = 1e-6  # for the rounding of a weighted sum


class Score(TransformNode[GroupBatch]):
    """A node that fills ``rewards`` and ``reward`` of all completions, in one call of the pool.

    A reward function sees the prompt's metadata with two additions: ``num_tokens``, the
    completion's length, and ``finish_reason``, ``"stop"`` or ``"length"``.

    It adds to the stats: ``reward/mean`` and ``reward/<name>`` over completions, ``_reward_sq``
    (the squares, for the standard deviation), ``solved`` (groups with a full reward in them, over
    groups), ``reward_failures`` (reward calls that failed) and ``time/score``.

    Args:
        source: a node of groups.
        pool: the rewards.
    """

    def __init__(self, source: BaseNode[GroupBatch], pool: RewardPool) -> None:
        super().__init__(source)
        self._pool = pool

    def next(self) -> GroupBatch:
        """Return the next groups, scored."""
        batch = next(self.source)
        start = time.perf_counter()
        result = self._pool.score(reward_items(batch.groups))
        completions = [completion for group in batch.groups for completion in group.completions]
        for i, completion in enumerate(completions):
            completion.rewards = result.rewards[i]
            completion.reward = result.totals[i]
        batch.stats |= self._stats(batch.groups, result)
        batch.stats["time/score"] = Time(time.perf_counter() - start)
        return batch

    def _stats(self, groups: list[Group], result: RewardResult) -> Metrics:
        num_completions = len(result.totals)
        squares = sum(total * total for total in result.totals)
        stats: Metrics = {
            "reward/mean": Mean(sum(result.totals), num_completions),
            "_reward_sq": Mean(squares, num_completions),
        }
        for reward in self._pool.rewards:
            total = sum(values[reward.name] for values in result.rewards)
            stats[f"reward/{reward.name}"] = Mean(total, num_completions)
        stats["solved"] = Mean(sum(self._is_solved(group) for group in groups), len(groups))
        stats["reward_failures"] = Sum(sum(result.failures.values()))
        return stats

    def _is_solved(self, group: Group) -> bool:
        full_reward = self._pool.full_reward - FULL_REWARD_TOLERANCE
        return any(completion.reward >= full_reward for completion in group.completions)


def reward_items(groups: list[Group]) -> list[Item]:
    """Return what the pool scores, one entry a completion in the groups' order."""
    items = []
    for group in groups:
        for completion in group.completions:
            items.append(_reward_item(group, completion))
    return items


def _reward_item(group: Group, completion: Completion) -> Item:
    prompt = group.prompt
    metadata = dict(prompt.metadata)
    metadata["num_tokens"] = len(completion.tokens)
    metadata["finish_reason"] = completion.finish_reason
    return prompt.text, completion.text, prompt.answer, metadata
