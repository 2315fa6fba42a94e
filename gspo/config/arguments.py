"""Ranges of arguments of torch's and torchtune's components, which check none or few themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gspo.config.value_types import Must, is_whole
from gspo.errors import NO_VALUE, InputError, did_you_mean

PROFILER = "torchtune.training.setup_torch_profiler"
_SWITCH = Must("true or false", lambda x: type(x) is bool)
_STEPS = Must("a whole number of 0 or more, or null", lambda x: x is None or is_whole(x, 0))
_ACTIVE_STEPS = Must("a whole number of 1 or more, or null", lambda x: x is None or is_whole(x, 1))
_FOLDER = Must("a text, or null", lambda x: x is None or isinstance(x, str))
_PROFILER_ARGUMENTS = {  # torchtune 0.6.1
    "enabled": _SWITCH,
    "cpu": _SWITCH,
    "cuda": _SWITCH,
    "xpu": _SWITCH,
    "profile_memory": _SWITCH,
    "with_stack": _SWITCH,
    "record_shapes": _SWITCH,
    "with_flops": _SWITCH,
    "wait_steps": _STEPS,
    "warmup_steps": _STEPS,
    "active_steps": _ACTIVE_STEPS,
    "num_cycles": _STEPS,
    "output_dir": _FOLDER,
}


def profiler_problems(options: Mapping[str, Any] | None) -> Iterator[InputError]:
    """Yield what is wrong with the arguments of torchtune's profiler; another's are its own.

    Args:
        options: The section ``profiler``.
    """
    arguments = dict(options or {})
    if arguments.pop("_component_", PROFILER) != PROFILER:
        return
    for name, value in arguments.items():
        key = f"profiler.{name}"
        must = _PROFILER_ARGUMENTS.get(name)
        if must is None:
            yield InputError(key, NO_VALUE, "unknown key", did_you_mean(name, _PROFILER_ARGUMENTS))
        elif not must.holds(value):
            yield InputError(key, value, f"must be {must.words}", "change it")


def warmup_problems(scheduler: Mapping[str, Any] | None) -> Iterator[InputError]:
    """Yield what is wrong with the warm-up of torchtune's schedules.

    A negative one would begin in the midst of the cosine.

    Args:
        scheduler: The section ``lr_scheduler``.
    """
    options = scheduler or {}
    is_torchtunes = str(options.get("_component_")).startswith("torchtune.")
    num_warmup_steps = options.get("num_warmup_steps", 0)
    if not is_torchtunes or is_whole(num_warmup_steps, 0):
        return
    yield InputError(
        "lr_scheduler.num_warmup_steps",
        num_warmup_steps,
        "must be a whole number of 0 or more",
        "change it",
    )


def not_finite_numbers(key: str, value: Any) -> Iterator[InputError]:
    """Yield the numbers in a section that are inf or nan.

    Args:
        key: Of the section.
        value: What it holds, at any depth.
    """
    children: Any = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    elif isinstance(value, float) and not math.isfinite(value):
        yield InputError(key, value, "must be a finite number", "write one like 1e-5")
    for name, child in children:
        yield from not_finite_numbers(f"{key}.{name}", child)
