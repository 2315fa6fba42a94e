"""Conditions on the values of config keys, in a form that checks and documents them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic_core import PydanticCustomError, core_schema

# numpy's generators take 32 bits, and torchtune adds the rank: room is left for 2**20 ranks.
LARGEST_SEED = 2**32 - 2**20
LARGEST_COUNT = 2**31 - 1  # of anything that is counted: no more fits a tensor's 32 bits


@dataclass(frozen=True)
class Must:
    """A condition on a value, with the words that finish the sentence "it must be ...".

    It stands in an ``Annotated`` type, in the place of pydantic's own check of the type.
    """

    words: str
    holds: Callable[[Any], bool]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Return the schema that pydantic checks a value by."""
        return core_schema.no_info_plain_validator_function(self._check)

    def _check(self, value: Any) -> Any:
        if not self.holds(value):
            raise PydanticCustomError("must", "must be {words}", {"words": self.words})
        return value


@dataclass(frozen=True)
class Given:
    """The arguments that the recipe passes to a component itself, or takes out of its mapping."""

    names: tuple[str, ...]


def is_whole(value: Any, least: int, most: int = LARGEST_COUNT) -> bool:
    """Whether a value is an int from ``least`` to ``most``; True and False are none."""
    return type(value) is int and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float; True and False are none."""
    if type(value) is int:
        return abs(value) < 1e300  # a whole number may be beyond any float
    return type(value) is float and math.isfinite(value)


def is_between(value: Any, least: float, most: float) -> bool:
    """Whether a value is an int or float from ``least`` to ``most``; True and False are none."""
    return type(value) in (int, float) and least <= value <= most


def is_path(value: Any) -> bool:
    """Whether a value is a text that can be the path of a file."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def is_above_zero_or_none(value: Any) -> bool:
    """Whether a value is a finite number above 0, or None."""
    return value is None or (is_number(value) and value > 0)


def is_share_or_none(value: Any) -> bool:
    """Whether a value is a number above 0 and up to 1, or None."""
    return value is None or (is_number(value) and 0 < value <= 1)


def are_ids(value: Any) -> bool:
    """Whether a value is a list of token ids."""
    return isinstance(value, list) and all(is_whole(element, 0) for element in value)


def is_component(value: Any) -> bool:
    """Whether a value is a mapping that names a component."""
    return isinstance(value, dict) and "_component_" in value


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def one_of(*choices: str) -> Must:
    """Make the condition that a value is one of some texts."""
    words = f"one of {', '.join(choices)}" if len(choices) > 2 else " or ".join(choices)
    return Must(words, lambda value: value in choices)


def count(least: int, most: int) -> Must:
    """Make the condition that a value is a whole number from ``least`` to ``most``."""
    words = f"a whole number of {least} or more, at most {most:,}"
    return Must(words, lambda value: is_whole(value, least, most))


_ONE_OR_MORE = count(1, LARGEST_COUNT)
Count = Annotated[int, _ONE_OR_MORE]
CountOrZero = Annotated[int, count(0, LARGEST_COUNT)]
OptionalCount = Annotated[
    int | None, Must(f"{_ONE_OR_MORE.words}, or left out", _or_none(_ONE_OR_MORE.holds))
]
# What is held in memory, or started, at once: far more than any run has, and still no harm.
GroupSize = Annotated[int, count(1, 65_536)]
SampleCountOrZero = Annotated[int, count(0, 65_536)]
PromptCount = Annotated[int, count(1, 2**20)]
ProcessCount = Annotated[int, count(1, 1_024)]
QueueLength = Annotated[int, count(0, 1_024)]
Seed = Annotated[
    int,
    Must(
        f"a whole number from 0 to {LARGEST_SEED}", lambda x: is_whole(x, 0) and x <= LARGEST_SEED
    ),
]
Switch = Annotated[bool, Must("true or false", lambda x: type(x) is bool)]
OptionalSwitch = Annotated[
    bool | None, Must("true, false or null", _or_none(lambda x: type(x) is bool))
]
Text = Annotated[str, Must("a text", lambda x: isinstance(x, str))]
FOLDER = Must("a text that names a folder", lambda x: is_path(x))
Folder = Annotated[str, FOLDER]
OptionalFolder = Annotated[
    str | None, Must("a text that names a folder, or null", lambda x: x is None or is_path(x))
]
Mapping = Annotated[
    dict[str, Any], Must("a mapping of names to values", lambda x: isinstance(x, dict))
]
Temperature = Annotated[
    float, Must("a number above 0, at least 1e-6", lambda x: is_number(x) and x >= 1e-6)
]
AboveZero = Annotated[float, Must("a number above 0", lambda x: is_number(x) and x > 0)]
Share = Annotated[float, Must("a share from 0 to 1", lambda x: is_between(x, 0, 1))]
Seconds = Annotated[
    float,
    Must(
        "a number of seconds above 0 and up to 86,400, a day",
        lambda x: is_between(x, 0, 86_400) and x > 0,
    ),
]
Component = Annotated[dict[str, Any], Must("a mapping with a _component_", is_component)]
OptionalComponent = Annotated[
    dict[str, Any] | None, Must("a mapping with a _component_, or null", _or_none(is_component))
]
