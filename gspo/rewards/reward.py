"""One entry of a config's ``rewards`` section: a function by name, its weight and its options.

An entry is checked in two steps. :func:`read_reward` imports nothing and runs in the trainer.
:func:`parse_reward` imports the function's module, which may do anything, and runs in a worker.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from types import ModuleType
from typing import Any

from gspo.errors import NO_VALUE, InputError, did_you_mean, require

RewardFunction = Callable[..., float]

_NUM_ARGUMENTS = 4  # prompt, completion, answer, metadata
_TAKEN_NAMES = ("mean", "std")  # reward/mean and reward/std are metrics of the weighted sum


@dataclass(frozen=True)
class Reward:
    """A reward function with the weight and the options that a config gives it."""

    name: str
    path: str
    weight: float
    options: dict[str, Any]
    max_value: float = 1.0  # the function's ``max_value`` attribute, where it has one


def reward_problems(rewards: Mapping[str, Mapping[str, Any]]) -> Iterator[InputError]:
    """Yield what is wrong with a config's ``rewards``, as far as no import is needed to see it."""
    if not isinstance(rewards, Mapping):
        yield InputError("rewards", rewards, "must be a mapping of names to rewards")
        return
    if not rewards:
        remedy = "name at least one, e.g. {correct: {function: my_file.reward}}"
        yield InputError("rewards", NO_VALUE, "there is none", remedy)
    for name, entry in rewards.items():
        try:
            read_reward(name, entry)
        except InputError as error:
            yield error


def read_reward(name: str, entry: Mapping[str, Any]) -> Reward:
    """Check an entry without an import and return it.

    Args:
        name: its key in the section, and of its metric ``reward/NAME``.
        entry: ``function`` (dotted path), ``weight`` (default 1) and the function's options.

    Raises:
        InputError: The entry is not usable. The key is ``rewards.NAME...`` in full, because the
            pool has arguments of two sections.
    """
    _check_name(name)
    section = f"rewards.{name}"
    path = None
    if isinstance(entry, Mapping):
        path = entry.get("function")
    if not isinstance(path, str):
        must = "needs a function, a dotted path like gspo.rewards.exact_match"
        raise InputError(section, entry, must)
    _check_path(f"{section}.function", path)
    options = dict(entry)
    del options["function"]
    weight = options.pop("weight", 1.0)
    is_finite = _is_finite(weight)
    require(is_finite, f"{section}.weight", weight, "must be a finite number")
    return Reward(name, path, float(weight), options)


def parse_reward(name: str, entry: Mapping[str, Any]) -> Reward:
    """Check an entry, the function that it names and the options for it, and return it.

    A function may carry ``check_options``, which is called with the options by keyword and raises
    an InputError with the name of one, and ``max_value``, the largest value that it returns.

    Args:
        name: see :func:`read_reward`.
        entry: see :func:`read_reward`.

    Raises:
        InputError: The entry is not usable, or the function's module fails to import.
    """
    reward = read_reward(name, entry)
    section = f"rewards.{name}"
    try:
        function = resolve(reward.path)
    except InputError as error:
        raise error.within(section) from error
    signature = _signature(section, reward.path, function)
    _check_options(section, reward.path, signature, reward.options)
    _check_values(section, reward, function)
    max_value = getattr(function, "max_value", 1.0)
    if not _is_finite(max_value):
        must = f"has a max_value of {max_value!r}, which must be a finite number"
        raise InputError(f"{section}.function", reward.path, must, "correct it in the module")
    return replace(reward, max_value=float(max_value))


def _check_name(name: Any) -> None:
    """Refuse a name that its metric ``reward/NAME`` cannot have."""
    is_text = isinstance(name, str) and name.strip() != ""
    remedy = "rename it, e.g. to correct"
    require(is_text, "rewards", name, "must not name a reward: a name is a text", remedy)
    must = "must not name a reward: its metric is reward/NAME"
    require("/" not in name, "rewards", name, f"{must}, which takes no other slash", remedy)
    is_free = name not in _TAKEN_NAMES
    require(is_free, "rewards", name, f"{must}, and reward/{name} is taken", remedy)


def _check_path(key: str, path: str) -> None:
    parts = path.split(".")
    is_dotted = len(parts) > 1 and all(part.isidentifier() for part in parts)
    remedy = "write it as gspo.rewards.exact_match or my_file.reward are"
    require(is_dotted, key, path, "is not a dotted path", remedy)


def _is_finite(value: Any) -> bool:
    """Whether a value is a number, of numpy's too, that a float holds and is finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def _check_values(section: str, reward: Reward, function: RewardFunction) -> None:
    """Have the function's own ``check_options``, if it has one, look at the options."""
    check = getattr(function, "check_options", None)
    if check is None:
        return
    try:
        check(**reward.options)
    except InputError as error:
        raise error.within(section) from error
    except Exception as error:
        kind = type(error).__name__
        must = f"{reward.path} refuses its options: {kind}: {error}"
        raise InputError(section, NO_VALUE, must, "correct them") from error


def resolve(path: str) -> RewardFunction:
    """Return the function that a dotted path names; the current directory's modules are known.

    Raises:
        InputError: There is no such module or name, its import fails, or it cannot be called.
    """
    module_name, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name, None)  # which may import, too
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the module raised it
        raise _import_error(path, error) from error
    if function is None:
        hint = did_you_mean(name, _public_names(module))
        raise InputError("function", path, f"is not there: {module_name} has no {name!r}", hint)
    if not callable(function):
        raise InputError("function", path, f"is a {type(function).__name__}, not a function")
    return function


def _import_error(path: str, error: BaseException) -> InputError:
    remedy = ""
    if isinstance(error, ModuleNotFoundError):
        remedy = f"looked in {os.getcwd()}: run from the file's folder or set PYTHONPATH"
    kind = type(error).__name__
    must = f"cannot be imported: {kind}: {error}"
    return InputError("function", path, must, remedy)


def _public_names(module: ModuleType) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed:
        return listed
    return [name for name in vars(module) if not name.startswith("_")]


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
