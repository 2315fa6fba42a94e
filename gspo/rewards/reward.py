"""One entry of a config's ``rewards`` section: a function by name, its weight and its options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gspo.errors import NO_VALUE, InputError, did_you_mean, require
from gspo.rewards.worker import RewardFunction, resolve

_NUM_ARGUMENTS = 4  # prompt, completion, answer, metadata


@dataclass(frozen=True)
class Reward:
    """A reward function with the weight and the options that a config gives it."""

    name: str
    path: str
    weight: float
    options: dict[str, Any]
    max_value: float  # the function's ``max_value`` attribute, 1 where it has none


def parse_reward(name: str, entry: Mapping[str, Any]) -> Reward:
    """Check an entry and return it.

    Args:
        name: its key in the section.
        entry: ``function`` (dotted path), ``weight`` (default 1) and the function's options.

    Raises:
        InputError: The entry is not usable. The key is ``rewards.NAME...`` in full, because the
            pool has arguments of two sections.
    """
    section = f"rewards.{name}"
    path = None
    if isinstance(entry, Mapping):
        path = entry.get("function")
    if not isinstance(path, str):
        must = "needs a function, a dotted path like gspo.rewards.exact_match"
        raise InputError(section, entry, must)
    options = dict(entry)
    del options["function"]
    weight = options.pop("weight", 1.0)
    is_finite = _is_finite(weight)
    require(is_finite, f"{section}.weight", weight, "must be a finite number")
    try:
        function = resolve(path)
    except InputError as error:
        raise error.within(section) from error
    signature = _signature(section, path, function)
    _check_options(section, path, signature, options)
    max_value = getattr(function, "max_value", 1.0)
    return Reward(name, path, float(weight), options, float(max_value))


def _is_finite(weight: Any) -> bool:
    if isinstance(weight, bool):
        return False
    is_number = isinstance(weight, int | float)
    return is_number and math.isfinite(weight)


def _signature(section: str, path: str, function: RewardFunction) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except ValueError as error:  # a builtin may have none
        key = f"{section}.function"
        must = f"is refused: {error}"
        raise InputError(key, path, must) from error


def _check_options(
    section: str, path: str, signature: inspect.Signature, options: Mapping[str, Any]
) -> None:
    try:
        signature.bind("", "", None, {}, **options)
        return
    except TypeError as error:
        reason = str(error)
    parameters = list(signature.parameters.values())
    choices = parameters[_NUM_ARGUMENTS:]
    kinds = [parameter.kind for parameter in parameters]
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    if not takes_any:
        names = [choice.name for choice in choices]
        _refuse_unknown(section, path, names, options)
    _refuse_missing(section, path, choices, options)
    key = f"{section}.function"
    must = f"{path}{signature} must take (prompt, completion, answer, metadata): {reason}"
    raise InputError(key, NO_VALUE, must)


def _refuse_unknown(section: str, path: str, names: list[str], options: Mapping[str, Any]) -> None:
    must = f"{path} has no such option"
    known = [*names, "weight"]
    for option in options:
        if option not in names:
            key = f"{section}.{option}"
            hint = did_you_mean(option, known)
            raise InputError(key, NO_VALUE, must, hint)


def _refuse_missing(
    section: str, path: str, choices: list[inspect.Parameter], options: Mapping[str, Any]
) -> None:
    for choice in choices:
        is_needed = choice.default is choice.empty
        if is_needed and choice.name not in options:
            key = f"{section}.{choice.name}"
            must = f"{path} needs this option"
            raise InputError(key, NO_VALUE, must)
