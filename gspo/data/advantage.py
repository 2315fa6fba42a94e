"""Rewards in, advantages out, one group at a time; dead groups and non-finite documents leave here.

Not here: the formulas, see :mod:`gspo.advantages`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from torchdata.nodes import BaseNode

from gspo.advantages import Estimator, all_equal, check_group_size, get_estimator
from gspo.data.node import TransformNode, as_numbers
from gspo.errors import InputError, require, show
from gspo.metrics import Mean, Sum
from gspo.types import Completion, Group, GroupBatch

logger = logging.getLogger(__name__)

_FLOAT32_MAX = 3.4028234663852886e38  # batches are float32, in which a larger number is infinite
_REPORTED_FIELDS = (
    "tokens",
    "logps",
    "text",
    "reward",
    "rewards",
    "advantage",
    "temperature",
    "policy_version",
)


def log_quarantine(record: dict[str, Any]) -> None:
    """Log a quarantined completion as one warning, without its tokens."""
    logger.warning(
        "quarantined a completion of prompt %s (group %d): %s is not finite; reward %s, rewards %s",
        record["prompt_id"],
        record["group_id"],
        record["cause"],
        record["reward"],
        record["rewards"],
    )


class Advantage(TransformNode[GroupBatch]):
    """A node that fills ``completion.advantage`` and keeps the completions that carry a gradient.

    - Quarantine: a completion whose reward, log-probabilities or advantage is not finite (in
      float32) leaves the numerator and every denominator; it counts as drawn. The others of its
      group get advantages from their own rewards; one that is left alone is a dead group.
    - Dead group: its rewards are exactly equal. Counted in ``dead_groups``; with
      ``drop_dead_groups`` taken out, its documents and label tokens staying in the denominators, or
      not when ``refill_dead_groups`` promises others.
    - A completion without tokens counts in its group's baseline, has nothing to train on, and is
      dropped: one document and no tokens in the denominators.

    Args:
        source: a node of scored groups.
        estimator: a name in :data:`gspo.advantages.ESTIMATORS`, or a callable ``[G] rewards -> [G]
            advantages``. One without a baseline, for which equal rewards do carry a signal, wants
            ``drop_dead_groups`` off.
        drop_dead_groups: take dead groups out before the update.
        refill_dead_groups: dropped documents do not count, so the step draws on until enough live
            ones came.
        on_quarantine: called with a dict of ids and values for each quarantined completion.

    Raises:
        InputError: An unknown estimator, or a refill without a drop. From ``next``: groups of one,
            or an estimator that does not give a number for each reward.
    """

    def __init__(
        self,
        source: BaseNode[GroupBatch],
        *,
        estimator: str | Estimator = "group_mean_std",
        drop_dead_groups: bool = True,
        refill_dead_groups: bool = False,
        on_quarantine: Callable[[dict[str, Any]], None] = log_quarantine,
    ) -> None:
        super().__init__(source)
        require(
            drop_dead_groups or not refill_dead_groups,
            "refill_dead_groups",
            refill_dead_groups,
            "needs drop_dead_groups: true",
            "kept groups cannot be replaced",
        )
        self.estimator = get_estimator(estimator)
        self.drop_dead_groups = drop_dead_groups
        self.refill_dead_groups = refill_dead_groups
        self.on_quarantine = on_quarantine
        self._causes: Counter[str] = Counter()  # of the rollout's quarantined completions

    def next(self) -> GroupBatch:
        """Return the next groups, their advantages filled in."""
        drawn = next(self.source)
        kept = GroupBatch([], dict(drawn.stats), drawn.dropped_documents, drawn.dropped_tokens)
        num_dead = 0
        self._causes.clear()
        for group in drawn.groups:
            check_group_size(self.estimator, len(group.completions))
            live = self._finite(group)
            is_dead = bool(live) and all_equal([c.reward for c in live])
            if is_dead and self.drop_dead_groups:
                if not self.refill_dead_groups:
                    _drop(live, kept)
            elif live:
                live = self._estimate(group, live)
                _keep(group, live, kept)
            num_dead += is_dead
            if is_dead:
                kept.dead_groups.append(group)
        kept.stats["dead_groups"] = Mean(float(num_dead), float(len(drawn.groups)))
        self._count_quarantined(drawn, kept)
        return kept

    def _count_quarantined(self, drawn: GroupBatch, kept: GroupBatch) -> None:
        """Count in ``kept`` the completions of ``drawn`` that were quarantined."""
        num_quarantined = self._causes.total()
        kept.quarantined_documents = drawn.quarantined_documents + num_quarantined
        kept.stats["quarantined_documents"] = Sum(float(num_quarantined))
        num_completions = sum(len(group.completions) for group in drawn.groups)
        if num_quarantined == num_completions > 0:
            ((kept.lost_to, _),) = self._causes.most_common(1)

    def _finite(self, group: Group) -> list[Completion]:
        """Return the completions with finite numbers, and report the others."""
        finite = []
        for completion in group.completions:
            if not _is_finite(completion.reward):
                self._report(group, completion, "reward")
            elif not _is_finite(sum(completion.logps)):  # one inf or nan makes the sum so
                self._report(group, completion, "logps")
            else:
                finite.append(completion)
        return finite

    def _estimate(self, group: Group, finite: list[Completion]) -> list[Completion]:
        """Set the advantages of ``finite`` and return those whose advantage is finite too."""
        left_alone = len(finite) == 1 < len(group.completions)
        advantages = [0.0] if left_alone else _call(self.estimator, [c.reward for c in finite])
        live = []
        for completion, advantage in zip(finite, advantages, strict=True):
            completion.advantage = advantage
            if _is_finite(completion.advantage):
                live.append(completion)
            else:
                self._report(group, completion, "advantage")
        return live

    def _report(self, group: Group, completion: Completion, cause: str) -> None:
        self._causes[cause] += 1
        record = {"prompt_id": group.prompt.id, "group_id": group.id, "cause": cause}
        for name in _REPORTED_FIELDS:
            record[name] = getattr(completion, name)
        self.on_quarantine(record)


def _call(estimator: Estimator, rewards: list[float]) -> list[float]:
    """Return an estimator's advantages.

    Raises:
        InputError: It gave something else than a number for each reward.
    """
    advantages = estimator(rewards)
    numbers = as_numbers(advantages)
    if numbers is None or len(numbers) != len(rewards):
        must = f"must give {len(rewards)} numbers for as many rewards, and gave "
        raise InputError(
            "advantages.estimator",
            getattr(estimator, "__qualname__", type(estimator).__name__),
            must + show(advantages, 80),
            "correct the function",
        )
    return numbers


def _keep(group: Group, live: list[Completion], batch: GroupBatch) -> None:
    """Put what a group has to train on into ``batch``, and count the rest of it as dropped."""
    with_tokens = [c for c in live if c.tokens]
    without_tokens = [c for c in live if not c.tokens]
    _drop(without_tokens, batch)
    if with_tokens:
        batch.groups.append(Group(group.id, group.prompt, with_tokens))


def _drop(completions: list[Completion], batch: GroupBatch) -> None:
    """Count completions in the batch's denominators alone."""
    batch.dropped_documents += len(completions)
    batch.dropped_tokens += sum(len(c.tokens) for c in completions)


def _is_finite(value: float) -> bool:
    return abs(value) <= _FLOAT32_MAX  # false for nan
