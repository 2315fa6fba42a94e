"""Rewards in, advantages out, one group at a time; dead groups and non-finite documents leave here.

What is not here: the formulas, see :mod:`gspo.advantages`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torchdata.nodes import BaseNode

from gspo.advantages import Estimator, all_equal, check_group_size, get_estimator
from gspo.data.node import Stateless
from gspo.errors import InputError
from gspo.types import Completion, Group, Rollout

logger = logging.getLogger(__name__)

_FLOAT32_MAX = 3.4028234663852886e38  # batches are float32, in which a larger number is infinite


def log_quarantine(record: dict[str, Any]) -> None:
    """The default for ``on_quarantine``: one warning in the log, without the tokens."""
    logger.warning(
        "quarantined a completion of prompt %s (group %d): %s is not finite; reward %s, rewards %s",
        *(record[name] for name in ("prompt_id", "group_id", "cause", "reward", "rewards")),
    )


class Advantage(Stateless[Rollout]):
    """Fills ``completion.advantage`` and leaves in each group the completions that carry a gradient.

    - Quarantine: a completion whose reward, log-probabilities or advantage is not finite (in float32) leaves the
      numerator and every denominator. The others of its group get advantages from their own rewards; one that is left
      alone is a dead group.
    - Dead group: its rewards are exactly equal. Counted in ``dead_groups``; with ``drop_dead_groups`` taken out, its
      documents and label tokens staying in the denominators, or not when ``refill_dead_groups`` promises others.
    - A completion without tokens counts in its group's baseline, has nothing to train on, and is dropped: one document
      and no tokens in the denominators.

    Args:
        source: a node of scored rollouts.
        estimator: a name in :data:`gspo.advantages.ESTIMATORS`, or a callable ``[G] rewards -> [G] advantages``. One
            without a baseline, for which equal rewards do carry a signal, wants ``drop_dead_groups`` off.
        drop_dead_groups: take dead groups out before the update.
        refill_dead_groups: dropped documents do not count, so the step draws on until enough live ones came.
        on_quarantine: called with a dict of ids and values for each quarantined completion.

    Raises:
        InputError: an unknown estimator, or a refill without a drop; from ``next``, groups of one.
    """

    def __init__(
        self,
        source: BaseNode[Rollout],
        estimator: str | Estimator = "group_mean_std",
        *,
        drop_dead_groups: bool = True,
        refill_dead_groups: bool = False,
        on_quarantine: Callable[[dict[str, Any]], None] = log_quarantine,
    ) -> None:
        super().__init__(source)
        if refill_dead_groups and not drop_dead_groups:
            raise InputError(
                "advantages.refill_dead_groups: true needs drop_dead_groups: true; kept groups cannot be replaced."
            )
        self.estimator = get_estimator(estimator)
        self.drop_dead_groups, self.refill_dead_groups = drop_dead_groups, refill_dead_groups
        self.on_quarantine = on_quarantine

    def next(self) -> Rollout:
        """The next rollout, its advantages filled in."""
        drawn = next(self.source)
        rollout = Rollout([], dict(drawn.stats), drawn.dropped_documents, drawn.dropped_tokens)
        num_dead = num_quarantined = 0
        for group in drawn.groups:
            check_group_size(self.estimator, len(group.completions))
            finite = self._finite(group)
            num_quarantined += len(group.completions) - len(finite)
            if not finite:
                continue
            dead = all_equal([c.reward for c in finite])
            num_dead += dead
            if dead and self.drop_dead_groups:
                self._drop([] if self.refill_dead_groups else finite, rollout)
                continue
            live = self._estimate(group, finite)
            num_quarantined += len(finite) - len(live)
            self._drop([c for c in live if not c.tokens], rollout)
            kept = [c for c in live if c.tokens]
            if kept:
                rollout.groups.append(Group(group.id, group.prompt, kept))
        rollout.stats["dead_groups"] = (float(num_dead), float(len(drawn.groups)))
        rollout.stats["quarantined_documents"] = (float(num_quarantined), 1.0)
        return rollout

    @staticmethod
    def _drop(completions: list[Completion], rollout: Rollout) -> None:
        rollout.dropped_documents += len(completions)
        rollout.dropped_tokens += sum(len(c.tokens) for c in completions)

    def _finite(self, group: Group) -> list[Completion]:
        """The group's completions with finite numbers; the others are reported."""
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
        """Set the advantages of ``finite``; give back those whose advantage is finite too."""
        left_alone = len(finite) == 1 < len(group.completions)
        advantages = [0.0] if left_alone else self.estimator([c.reward for c in finite])
        live = []
        for completion, advantage in zip(finite, advantages, strict=True):
            completion.advantage = float(advantage)
            if _is_finite(completion.advantage):
                live.append(completion)
            else:
                self._report(group, completion, "advantage")
        return live

    def _report(self, group: Group, completion: Completion, cause: str) -> None:
        names = (
            "tokens",
            "logps",
            "text",
            "reward",
            "rewards",
            "advantage",
            "temperature",
            "policy_version",
        )
        values = {name: getattr(completion, name) for name in names}
        self.on_quarantine(
            {"prompt_id": group.prompt.id, "group_id": group.id, "cause": cause, **values}
        )


def _is_finite(value: float) -> bool:
    return abs(value) <= _FLOAT32_MAX  # false for nan
