"""Writes what was sampled to a file, on its way to the packer."""

from __future__ import annotations

import json
from pathlib import Path

from torchdata.nodes import BaseNode

from gspo.data.node import Stateless
from gspo.types import Rollout


class Record(Stateless[Rollout]):
    """Passes rollouts on and appends the first completions of each to a JSONL file, one a group.

    Args:
        source: a node of scored rollouts with advantages.
        path: the file; made with its folder, and appended to.
        num_per_rollout: completions written of each rollout; 0 writes none.
    """

    def __init__(self, source: BaseNode[Rollout], path: Path, *, num_per_rollout: int) -> None:
        super().__init__(source)
        self._path = path
        self._num_per_rollout = num_per_rollout

    def next(self) -> Rollout:
        """The next rollout, unchanged."""
        rollout = next(self.source)
        if self._num_per_rollout:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in _lines(rollout, self._num_per_rollout))
        return rollout


def _lines(rollout: Rollout, limit: int) -> list[str]:
    return [
        json.dumps(
            {
                "prompt_id": group.prompt.id,
                "prompt": group.prompt.text,
                "completion": group.completions[0].text,
                "answer": group.prompt.answer,
                "reward": group.completions[0].reward,
                "rewards": group.completions[0].rewards,
                "advantage": group.completions[0].advantage,
                "finish_reason": group.completions[0].finish_reason,
                "policy_version": group.completions[0].policy_version,
            }
        )
        for group in rollout.groups[:limit]
        if group.completions
    ]
