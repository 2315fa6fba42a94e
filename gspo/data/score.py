"""Scoring: the node that gives sampled completions their rewards."""

from __future__ import annotations

import time
from collections import Counter

from torchdata.nodes import BaseNode

from gspo.data.node import TransformNode
from gspo.metrics import Mean, Metrics, Sum, Time
from gspo.rewards.extraction import without_thinking
from gspo.rewards.pool import RewardResult, Scorer
from gspo.rewards.restating import repeats_prompt
from gspo.rewards.worker import Item
from gspo.types import Completion, Group, GroupBatch

FULL_REWARD_TOLERANCE = 1e-6  # for the rounding of a weighted sum


class Score(TransformNode[GroupBatch]):
    """A node that fills ``rewards`` and ``reward`` of all completions, in one call of the pool.

    A reward function sees the prompt's metadata with two additions: ``num_tokens``, the
    completion's length, and ``finish_reason``, ``"stop"`` or ``"length"``.

    It adds to the stats: ``reward/mean`` and ``reward/<name>`` over completions, ``_reward_sq``
    (the squares, for the standard deviation), ``solved`` (groups with a full reward in them, see
    :func:`full_rewards`, over groups), ``rewarded/*`` (see :func:`rewarded_stats`),
    ``reward_failures`` (reward calls that failed) and ``time/score``.

    Args:
        source: a node of groups.
        pool: the rewards.
    """

    def __init__(self, source: BaseNode[GroupBatch], pool: Scorer) -> None:
        super().__init__(source)
        self._pool = pool

    def next(self) -> GroupBatch:
        """Return the next groups, scored."""
        batch = next(self.source)
        start = time.perf_counter()
        groups = batch.groups
        items = reward_items(groups)
        result = self._pool.score(items)
        _set_rewards(groups, result)
        num_solved = self._count_solved(groups, result)
        batch.stats |= self._reward_stats(result)
        batch.stats["solved"] = Mean(num_solved, len(groups))
        batch.stats |= rewarded_stats(groups)
        num_failures = sum(result.failures.values())
        batch.stats["reward_failures"] = Sum(num_failures)
        seconds = time.perf_counter() - start
        batch.stats["time/score"] = Time(seconds)
        return batch

    def _reward_stats(self, result: RewardResult) -> Metrics:
        totals = result.totals
        num_completions = len(totals)
        sum_of_totals = sum(totals)
        sum_of_squares = sum(total * total for total in totals)
        stats: Metrics = {
            "reward/mean": Mean(sum_of_totals, num_completions),
            "_reward_sq": Mean(sum_of_squares, num_completions),
        }
        for reward in self._pool.rewards:
            name = f"reward/{reward.name}"
            values = [rewards[reward.name] for rewards in result.rewards]
            total = sum(values)
            stats[name] = Mean(total, num_completions)
        return stats

    def _count_solved(self, groups: list[Group], result: RewardResult) -> int:
        is_full = iter(full_rewards(self._pool, result))
        num_solved = 0
        for group in groups:
            num_full = sum(next(is_full) for _ in group.completions)
            num_solved += num_full > 0
        return num_solved


def rewarded_stats(groups: list[Group]) -> Metrics:
    """Return what of the completions with a reward above 0 may have earned it with nothing.

    - ``rewarded/truncated``: was cut by its length.
    - ``rewarded/repeats_prompt``: has much of its prompt's text behind its thinking, see
      :func:`gspo.rewards.restating.repeats_prompt`.
    - ``rewarded/same_text``: has the text that is rewarded most often, among those that are
      rewarded for more than one of these groups.
    """
    num_rewarded = num_truncated = num_repeating = 0
    groups_of_text: dict[str, Counter[int]] = {}
    for number, group in enumerate(groups):
        prompt = group.prompt.text
        for completion in group.completions:
            if not completion.reward > 0:
                continue
            num_rewarded += 1
            num_truncated += completion.finish_reason == "length"
            text = without_thinking(completion.text, prompt)
            num_repeating += repeats_prompt(prompt, text)
            groups_of_text.setdefault(completion.text, Counter())[number] += 1
    shared = [counts.total() for counts in groups_of_text.values() if len(counts) > 1]
    return {
        "rewarded/truncated": Mean(num_truncated, num_rewarded),
        "rewarded/repeats_prompt": Mean(num_repeating, num_rewarded),
        "rewarded/same_text": Mean(max(shared, default=0), num_rewarded),
    }


def full_rewards(pool: Scorer, result: RewardResult) -> list[bool]:
    """Return, for each scored item, whether all its calls went well and earn the full reward.

    A failed call counts as 0, which is all that a penalty can give.
    """
    least = pool.full_reward - FULL_REWARD_TOLERANCE
    is_full = []
    for total, has_failed in zip(result.totals, result.failed, strict=True):
        is_full.append(total >= least and not has_failed)
    return is_full


def reward_items(groups: list[Group]) -> list[Item]:
    """Return what the pool scores, one entry a completion in the groups' order."""
    items = []
    for group in groups:
        for completion in group.completions:
            items.append(_reward_item(group, completion))
    return items


def _set_rewards(groups: list[Group], result: RewardResult) -> None:
    """Put the pool's results, which are in the groups' order, into the completions."""
    scored = zip(result.rewards, result.totals, strict=True)
    for group in groups:
        for completion in group.completions:
            rewards, total = next(scored)
            completion.rewards = rewards
            completion.reward = total


def _reward_item(group: Group, completion: Completion) -> Item:
    prompt = group.prompt
    metadata = dict(prompt.metadata)
    metadata["num_tokens"] = len(completion.tokens)
    metadata["finish_reason"] = completion.finish_reason
    return prompt.text, completion.text, prompt.answer, metadata
