"""A reward function of the caller's, called in this process.

Nothing guards a call: no time limit, and what it raises ends the step. The recipe's pool
(:mod:`gspo.rewards.pool`) is for that.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gspo.errors import NO_VALUE, InputError, require
from gspo.rewards.pool import RewardResult
from gspo.rewards.reward import Reward
from gspo.rewards.worker import Item
from gspo.trainer.queries import QUERY, is_chat

_FORMS = (
    "must take prompts and completions, as TRL's reward functions do, or one prompt and completion"
)
_REMEDY = (
    "write def reward(prompts, completions, **columns), which returns a list of numbers, or "
    "def reward(prompt, completion, answer, metadata), which returns one"
)


class CalledRewards:
    """A reward function in the form of a :class:`gspo.rewards.pool.RewardPool`.

    The parameters' names say how it is called, always by keyword, and with those alone that it
    takes:

    - ``completions``, or ``**columns`` alone: once, with lists. ``prompts`` are the queries,
      ``completions`` their texts, of a chat ``[{"role": "assistant", "content": text}]``. The
      columns, ``num_tokens`` and ``finish_reason`` are lists too, one entry a completion. It
      returns as many numbers; None leaves a completion out of the step.
    - ``completion``: for each. ``prompt`` and ``completion`` are texts, ``answer`` is that column's
      or None, ``metadata`` has the row's columns, ``num_tokens`` and ``finish_reason``; the columns
      can be taken by name as well. It returns a number. So every function that a config can name
      fits.

    The full reward is 1, or the function's attribute ``max_value``.

    Raises:
        InputError: It is neither.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        name = getattr(function, "__name__", type(function).__name__)
        require(callable(function), "reward_function", function, "must be a function", _REMEDY)
        self._function = function
        self._signature = inspect.signature(function)
        self._takes_lists = _takes_lists(self._signature, name)
        max_value = float(getattr(function, "max_value", 1.0))
        self.rewards = [Reward(name, name, 1.0, {}, max_value)]

    @property
    def full_reward(self) -> float:
        """The reward of a completion with nothing left to gain."""
        return self.rewards[0].max_value

    def score(self, items: Sequence[Item]) -> RewardResult:
        """Score ``(prompt, completion, answer, metadata)`` items, with one call or a call each."""
        totals = self._score_lists(items) if self._takes_lists else self._score_each(items)
        name = self.rewards[0].name
        rewards = [{name: total} for total in totals]
        return RewardResult(rewards, totals, [False] * len(totals), {})

    def _score_lists(self, items: Sequence[Item]) -> list[float]:
        if not items:
            return []
        offered: dict[str, Any] = {"prompts": [], "completions": []}
        for _, completion, _, metadata in items:
            query = metadata[QUERY]
            offered["prompts"].append(query)
            offered["completions"].append(_as_answer_to(query, completion))
        for name in items[0][3]:
            if name != QUERY:
                offered[name] = [metadata[name] for *_, metadata in items]
        values = self._call(offered)
        must = f"must be a list of {len(items)} numbers, one for each completion"
        has_length = hasattr(values, "__len__")
        if not has_length or len(values) != len(items):
            raise InputError(self._name_of_result(), values, must, "return one for each")
        return [self._number(value) for value in values]

    def _score_each(self, items: Sequence[Item]) -> list[float]:
        totals = []
        for prompt, completion, answer, metadata in items:
            row = {name: value for name, value in metadata.items() if name != QUERY}
            offered = {
                **row,
                "prompt": prompt,
                "completion": completion,
                "answer": answer,
                "metadata": row,
            }
            value = self._call(offered)
            totals.append(self._number(value))
        return totals

    def _call(self, offered: Mapping[str, Any]) -> Any:
        """Call the function with what it takes of ``offered``."""
        parameters = self._signature.parameters
        takes_any = _takes_any(self._signature)
        chosen = {k: v for k, v in offered.items() if takes_any or k in parameters}
        try:
            self._signature.bind(**chosen)
        except TypeError as error:
            must = f"{self.rewards[0].name}{self._signature} cannot be called: {error}"
            remedy = f"there are {', '.join(sorted(offered))}; give other columns by keyword"
            raise InputError("reward_function", NO_VALUE, must, remedy) from error
        return self._function(**chosen)

    def _number(self, value: Any) -> float:
        if value is None:
            return math.nan  # which leaves the step's numerator and denominators
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            must = "must be a number, or None to leave the completion out"
            raise InputError(self._name_of_result(), value, must) from error

    def _name_of_result(self) -> str:
        return f"the result of reward_function {self.rewards[0].name}"


def _takes_lists(signature: inspect.Signature, name: str) -> bool:
    """Return whether a function takes all completions at once, or one at a time."""
    parameters = signature.parameters
    if "completions" in parameters:
        return True
    if "completion" in parameters:
        return False
    takes_any = _takes_any(signature)
    require(takes_any, "reward_function", f"{name}{signature}", _FORMS, _REMEDY)
    return True


def _takes_any(signature: inspect.Signature) -> bool:
    """Return whether a function takes arguments by any name."""
    return any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())


def _as_answer_to(query: Any, completion: str) -> Any:
    if not is_chat(query):
        return completion
    return [{"role": "assistant", "content": completion}]
