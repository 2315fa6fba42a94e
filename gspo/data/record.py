"""Examples of what was sampled, on its way to the packer.

Not here: the file they are written to, which is the run folder's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchdata.nodes import BaseNode

from gspo.data.node import TransformNode
from gspo.types import Group, GroupBatch

Rows = list[dict[str, Any]]


class Record(TransformNode[GroupBatch]):
    """A node that passes rollouts on and writes the first completion of some groups of each.

    Dead groups are written too, also those that were dropped: where every group is dead, they are
    what one wants to look at.

    Args:
        source: a node of scored groups with advantages; one of its items is a rollout.
        write: called with plain dicts, which JSON can take.
        num_per_rollout: completions written of each rollout, one a group, in the order in which
            the groups were drawn; 0 writes none.
    """

    def __init__(
        self,
        source: BaseNode[GroupBatch],
        write: Callable[[Rows], object],
        *,
        num_per_rollout: int,
    ) -> None:
        super().__init__(source)
        self._write = write
        self._num_per_rollout = num_per_rollout

    def next(self) -> GroupBatch:
        """Return the next rollout, unchanged."""
        rollout = next(self.source)
        dead = {group.id: group for group in rollout.dead_groups}
        drawn = dead | {group.id: group for group in rollout.groups}
        rows = []
        for number in sorted(drawn)[: self._num_per_rollout]:
            if drawn[number].completions:
                rows.append(_row(drawn[number], number in dead))
        if rows:
            self._write(rows)
        return rollout


def _row(group: Group, is_dead: bool) -> dict[str, Any]:
    completion = group.completions[0]
    return {
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "completion": completion.text,
        "answer": group.prompt.answer,
        "reward": completion.reward,
        "rewards": completion.rewards,
        "advantage": completion.advantage,
        "dead": is_dead,
        "finish_reason": completion.finish_reason,
        "policy_version": completion.policy_version,
    }
