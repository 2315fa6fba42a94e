"""Prompts, samplers and rewards without a model: every value follows from the arguments."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torchdata.nodes import BaseNode

from gspo.types import Completion, Group, GroupBatch, Prompt, SamplingParams

PARAMS = SamplingParams(temperature=0.7, max_new_tokens=9)


class Items(BaseNode[Any]):
    """Yields ``make(0)``, ``make(1)``, ..., each made anew."""

    def __init__(self, make, num_items: int) -> None:
        super().__init__()
        self.make, self.num_items = make, num_items

    def reset(self, initial_state=None) -> None:
        super().reset(initial_state)
        self.done = 0 if initial_state is None else initial_state["done"]

    def get_state(self):
        return {"done": self.done}

    def next(self):
        if self.done == self.num_items:
            raise StopIteration
        self.done += 1
        return self.make(self.done - 1)


def prompt(index: int) -> Prompt:
    return Prompt(
        id=f"p:{index}",
        text=f"prompt {index}",
        tokens=list(range(1, 2 + index % 4)),
        answer=str(index),
    )


class FakeSampler:
    """Completions of 1 to ``max_new_tokens`` tokens, random by the seed; remembers its calls."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields
        self.calls: list[tuple[list[str], int]] = []

    def sample(self, prompts, *, group_size, params, seeds):
        self.calls.append(([p.id for p in prompts], seeds))
        draws = [np.random.default_rng(seed) for seed in seeds]
        return [[self._completion(draw, params) for _ in range(group_size)] for draw in draws]

    def _completion(self, draw, params) -> Completion:
        size = int(draw.integers(1, params.max_new_tokens + 1))
        values = dict(
            tokens=draw.integers(10, 99, size).tolist(),
            logps=(-draw.random(size)).tolist(),
            text=str(size),
            finish_reason="length" if size == params.max_new_tokens else "stop",
            temperature=params.temperature,
        )
        return Completion(**(values | self.fields))

    def update(self, policy, version):
        raise NotImplementedError


class FakePool:
    """Rewards an odd number of tokens with 1."""

    rewards = [SimpleNamespace(name="odd")]
    full_reward = 1.0

    def score(self, items):
        totals = [float(int(completion) % 2) for _, completion, _, _ in items]
        rewards = [{"odd": total} for total in totals]
        failed = [False] * len(totals)
        return SimpleNamespace(rewards=rewards, totals=totals, failed=failed, failures={})


def completion(num_tokens: int = 3, reward: float = 0.0, **fields: Any) -> Completion:
    values = dict(
        tokens=list(range(50, 50 + num_tokens)),
        logps=[-0.5 - i for i in range(num_tokens)],
        text="",
        finish_reason="stop",
        temperature=1.0,
        reward=reward,
    )
    return Completion(**(values | fields))


def rollout(*groups: list[Completion], **fields: Any) -> GroupBatch:
    """One item of a node before the packer: a group for each list."""
    return GroupBatch(
        [Group(i, prompt(i), list(completions)) for i, completions in enumerate(groups)], **fields
    )


def exact(item: Any) -> Any:
    """``item`` so that ``==`` compares tensors bit for bit, and leaves out times."""
    if isinstance(item, torch.Tensor):
        return item.dtype, item.shape, item.numpy().tobytes()
    if dataclasses.is_dataclass(item):
        return type(item).__name__, [exact(getattr(item, f.name)) for f in dataclasses.fields(item)]
    if isinstance(item, dict):
        return {k: exact(v) for k, v in item.items() if not k.startswith("time/")}
    if isinstance(item, list | tuple):
        return [exact(v) for v in item]
    return item
