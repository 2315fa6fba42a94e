"""One entry of a config's ``rewards`` section: a function by name, its weight and its options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gspo.errors import NO_VALUE, InputError, did_you_mean, require
from gspo.rewards.worker import resolve

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
    path = entry.get("function") if isinstance(entry, Mapping) else None
    if not isinstance(path, str):
        must = "needs a function, a dotted path like gspo.rewards.exact_match"
        raise InputError(section, entry, must)
    options = dict(entry)
    del options["function"]
    weight = options.pop("weight", 1.0)
    require(_is_finite(weight), f"{section}.weight", weight, "must be a finite number")
    try:
        function = resolve(path)
    except InputError as error:
        raise error.within(section) from error
    try:
        signature = inspect.signature(function)
    except ValueError as error:  # a builtin may have none
        raise InputError(f"{section}.function", path, f"is refused: {error}") from error
    _check_options(section, path, signature, options)
    max_value = getattr(function, "max_value", 1.0)
    return Reward(name, path, float(weight), options, float(max_value))


def _is_finite(weight: Any) -> bool:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    return is_number and math.isfinite(weight)


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
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        _refuse_unknown(section, path, [choice.name for choice in choices], options)
    for choice in choices:
        is_missing = choice.default is choice.empty and choice.name not in options
        require(not is_missing, f"{section}.{choice.name}", NO_VALUE, f"{path} needs this option")
    must = f"{path}{signature} must take (prompt, completion, answer, metadata): {reason}"
    raise InputError(f"{section}.function", NO_VALUE, must)


def _refuse_unknown(section: str, path: str, names: list[str], options: Mapping[str, Any]) -> None:
    for option in options:
        if option not in names:
            hint = did_you_mean(option, [*names, "weight"])
            must = f"{path} has no such option"
            raise InputError(f"{section}.{option}", NO_VALUE, must, hint)
