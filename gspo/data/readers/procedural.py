"""Tasks that reasoning-gym generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gspo.errors import InputError, did_you_mean, require


class ReasoningGymRows:
    """Procedurally generated tasks of reasoning-gym.

    A row's fields are ``question``, ``answer``, those of the task's metadata, and ``entry``: the
    whole entry, which :func:`gspo.rewards.reasoning_gym` scores by.
    """

    def __init__(
        self,
        name: str,
        size: int = 500,
        dataset_seed: int = 0,
        dataset_options: Mapping[str, Any] | None = None,
    ) -> None:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            hint = did_you_mean(name, DATASETS)
            raise InputError("name", must=f"reasoning-gym has no {name!r}", remedy=hint)
        require(size >= 1, "size", size, "must be at least 1")
        options = dict(dataset_options or {})
        try:
            self._dataset = reasoning_gym.create_dataset(
                name, size=size, seed=dataset_seed, **options
            )
        except (TypeError, ValueError, AssertionError) as error:  # its configs' refusals
            must = f"reasoning-gym's {name} refuses {dataset_options}: {error}"
            raise InputError("dataset_options", must=must) from error
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self._dataset[index]
        row = dict(entry["metadata"])
        row["question"] = entry["question"]
        row["answer"] = entry["answer"]
        row["entry"] = entry
        return row

    def name(self, index: int) -> str:
        """Return the task and the row, from 0."""
        return f"reasoning_gym/{self._name}:{index}"
