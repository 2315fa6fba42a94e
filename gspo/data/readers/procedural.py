"""Tasks that reasoning-gym generates, one at a time or mixed, at one level or at rising ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gspo.errors import NO_VALUE, InputError, did_you_mean, require


class ReasoningGymRows:
    """Procedurally generated tasks of reasoning-gym.

    A row's fields are ``question``, ``answer``, those of the task's metadata, and ``entry``: the
    whole entry, which :func:`gspo.rewards.reasoning_gym` scores by.

    Args:
        name: of the task.
        size: rows to generate.
        dataset_seed: of the first row; the next has the next seed, so near seeds share rows.
        dataset_options: of the task.
        excluded: ``size`` and ``dataset_seed`` of the held-out rows of the same task. Rows that ask
            one of their questions are left out.
    """

    def __init__(
        self,
        name: str,
        size: int = 500,
        dataset_seed: int = 0,
        dataset_options: Mapping[str, Any] | None = None,
        excluded: Mapping[str, Any] | None = None,
    ) -> None:
        require(size >= 1, "size", size, "must be at least 1")
        _check_name("name", name)
        self._dataset = _generate(name, size, dataset_seed, dataset_options, "dataset_options")
        self._name = name
        self._indices: Sequence[int] = range(size)
        if excluded is not None:
            _check_excluded(excluded)
            held_out = ReasoningGymRows(name, dataset_options=dataset_options, **excluded)
            self._leave_out({entry["question"] for entry in held_out._dataset})

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _row(self._dataset[self._indices[index]])

    def name(self, index: int) -> str:
        """Return the task and the row, from 0, those that are left out counted."""
        return f"reasoning_gym/{self._name}:{self._indices[index]}"

    def _leave_out(self, questions: set[str]) -> None:
        kept = []
        for index, entry in enumerate(self._dataset):
            if entry["question"] not in questions:
                kept.append(index)
        must = f"has every question that {self._name} asks"
        require(len(kept) > 0, "excluded", NO_VALUE, must, "lower its size")
        self._indices = kept


class ReasoningGymMixtureRows:
    """Several tasks of reasoning-gym by weight, each at levels that rise from row to row.

    The rows are as many prompts as the way from the easiest level to the hardest takes. A task with
    K levels has the first in the first K-th of the rows, and so on. Each row's task is drawn by the
    weights, from the seed and the row's number alone. So a reader with ``shuffle: false`` gives a
    curriculum by prompts seen: the same after a resume, and the same level on all ranks. A reader
    that shuffles gives all levels at once. After the last row the first comes again.

    A row's fields are those of :class:`ReasoningGymRows`, with ``task`` and ``level``, from 0.

    Args:
        tasks: by name. Each is a mapping with ``levels``, a list of the task's options from easy
            to hard ({} for its defaults), and ``weight`` (1).
        size: rows.
        dataset_seed: of the rows. Two readers share none if their seeds are more than ``size``
            apart.

    Raises:
        InputError: A task is not known, or refuses its options.
    """

    def __init__(
        self, tasks: Mapping[str, Mapping[str, Any]], size: int = 10_000, dataset_seed: int = 0
    ) -> None:
        is_mapping = isinstance(tasks, Mapping) and len(tasks) > 0
        must = "must be a mapping of tasks"
        remedy = "write e.g. {chain_sum: {levels: [{max_terms: 2}, {max_terms: 4}]}}"
        require(is_mapping, "tasks", tasks, must, remedy)
        require(size >= 1, "size", size, "must be at least 1")
        self._size = size
        self._seed = dataset_seed
        self._names = list(tasks)
        weights = []
        self._levels = []  # of each task
        for name, task in tasks.items():
            key = f"tasks.{name}"
            _check_name(key, name)
            levels, weight = _check_task(key, task)
            datasets = []
            for number, options in enumerate(levels):
                place = f"{key}.levels.{number}"
                datasets.append(_generate(name, size, dataset_seed, options, place))
            self._levels.append(datasets)
            weights.append(weight)
        self._shares = np.cumsum(weights) / sum(weights)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        task, level = self._place(index)
        row = _row(self._levels[task][level][index])
        row["task"] = self._names[task]
        row["level"] = level
        return row

    def name(self, index: int) -> str:
        """Return the task, its level and the row, from 0."""
        task, level = self._place(index)
        return f"reasoning_gym/{self._names[task]}/{level}:{index}"

    def _place(self, index: int) -> tuple[int, int]:
        """Return the numbers of a row's task and of its level."""
        drawn = np.random.default_rng([self._seed, index]).random()
        task = int(np.searchsorted(self._shares, drawn, side="right"))
        num_levels = len(self._levels[task])
        return task, index * num_levels // self._size


def _check_excluded(excluded: Mapping[str, Any]) -> None:
    is_named = isinstance(excluded, Mapping) and set(excluded) == {"size", "dataset_seed"}
    must = "must have size and dataset_seed, and nothing else"
    require(is_named, "excluded", excluded, must, "write those of the held-out rows")


def _check_task(key: str, task: Any) -> tuple[Sequence[Mapping[str, Any]], float]:
    """Return a task's levels and weight."""
    is_mapping = isinstance(task, Mapping)
    must = "must be a mapping with levels, and weight if it is not 1"
    require(is_mapping, key, task, must, "write e.g. {levels: [{}], weight: 2}")
    for name in task:
        if name not in ("levels", "weight"):
            hint = did_you_mean(str(name), ("levels", "weight"))
            raise InputError(f"{key}.{name}", must="is unknown", remedy=hint)
    levels = task.get("levels")
    is_list = isinstance(levels, Sequence) and not isinstance(levels, str) and len(levels) > 0
    must = "must be a list of the task's options from easy to hard"
    require(is_list, f"{key}.levels", levels, must, "write [{}] for the task's defaults")
    for number, options in enumerate(levels):
        is_options = isinstance(options, Mapping)
        must = "must be a mapping of the task's options"
        require(is_options, f"{key}.levels.{number}", options, must, "write {} for its defaults")
    weight = task.get("weight", 1)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    is_weight = is_number and 0 < weight < float("inf")
    require(is_weight, f"{key}.weight", weight, "must be a number above 0", "leave out the task")
    return levels, float(weight)


def _check_name(key: str, name: str) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS)
        raise InputError(key, must=f"reasoning-gym has no {name!r}", remedy=hint)


def _generate(
    name: str, size: int, seed: int, options: Mapping[str, Any] | None, key: str
) -> Sequence[dict[str, Any]]:
    """Return a dataset of the library, whose options stand under a key of the config."""
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **dict(options or {}))
    except (TypeError, ValueError, AssertionError) as error:  # its configs' refusals
        must = f"reasoning-gym's {name} refuses {options}: {error}"
        raise InputError(key, must=must) from error


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an entry of the library."""
    row = dict(entry["metadata"])
    row["question"] = entry["question"]
    row["answer"] = entry["answer"]
    row["entry"] = entry
    return row
