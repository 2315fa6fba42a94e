"""Reward functions and the pool of workers that runs them.

A reward is a plain function ``(prompt, completion, answer, metadata) -> float`` with its options
as keyword arguments; a config names it by dotted path. Nothing here imports torch, and a name is
imported when it is first used: a reward worker then starts in tens of milliseconds and loads only
the verifiers that it runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo.rewards.length import overlong_penalty
    from gspo.rewards.math import math_verify
    from gspo.rewards.pool import RewardPool, RewardResult
    from gspo.rewards.procedural import reasoning_gym
    from gspo.rewards.text import exact_match, regex_match

__all__ = [
    "RewardPool",
    "RewardResult",
    "exact_match",
    "math_verify",
    "overlong_penalty",
    "reasoning_gym",
    "regex_match",
]

_MODULES = {
    "RewardPool": "gspo.rewards.pool",
    "RewardResult": "gspo.rewards.pool",
    "exact_match": "gspo.rewards.text",
    "math_verify": "gspo.rewards.math",
    "overlong_penalty": "gspo.rewards.length",
    "reasoning_gym": "gspo.rewards.procedural",
    "regex_match": "gspo.rewards.text",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    path = _MODULES[name]
    module = importlib.import_module(path)
    return getattr(module, name)
