"""Ranges of arguments of components that check none or few themselves, torchtune's above all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gspo.config.value_types import FOLDER, Must, are_ids, is_number, is_whole
from gspo.errors import NO_VALUE, InputError, did_you_mean

LOCAL_SAMPLERS = ("gspo.sampling.local.LocalSampler", "gspo.sampling.LocalSampler")
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
_WHOLE = Must("a whole number of 1 or more, without a point", lambda x: is_whole(x, 1))
_LOCAL_SAMPLER_ARGUMENTS = {
    "max_batch_size": _WHOLE,
    "max_prefill_tokens": _WHOLE,
    "progress": _SWITCH,
    "stop_token_ids": Must("a list of token ids, or null", lambda x: x is None or are_ids(x)),
}
_OPTIMIZER_ARGUMENTS = {
    "betas": Must("two numbers, e.g. [0.9, 0.95]", lambda x: _is_list_of(x, is_number, 2))
}
_FOLDERS = {"checkpoint_dir": FOLDER, "output_dir": FOLDER}
_CHECKPOINTER_ARGUMENTS = {
    "checkpoint_files": Must(
        "a list of file names, or a mapping with filename_format and max_filename",
        lambda x: isinstance(x, Mapping) or _is_list_of(x, _is_text),
    )
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(value: Any, holds: Callable[[Any], bool], length: int | None = None) -> bool:
    if not isinstance(value, list) or not all(holds(element) for element in value):
        return False
    return length is None or len(value) == length


def sampler_problems(sampler: Mapping[str, Any]) -> Iterator[InputError]:
    """Yield what is wrong with the arguments of the shipped sampler.

    Args:
        sampler: The section ``sampler``.
    """
    if sampler["_component_"] in LOCAL_SAMPLERS:
        yield from _misfits("sampler", sampler, _LOCAL_SAMPLER_ARGUMENTS)


def optimizer_problems(optimizer: Mapping[str, Any]) -> Iterator[InputError]:
    """Yield what is wrong with the arguments of torch's and torchao's optimizers.

    Args:
        optimizer: The section ``optimizer``.
    """
    if str(optimizer["_component_"]).startswith(("torch.", "torchao.")):
        yield from _misfits("optimizer", optimizer, _OPTIMIZER_ARGUMENTS)


def checkpointer_problems(key: str, checkpointer: Mapping[str, Any] | None) -> Iterator[InputError]:
    """Yield what is wrong with the folders of a checkpointer, and the files of torchtune's.

    Args:
        key: Of the section.
        checkpointer: What it holds.
    """
    options = checkpointer or {}
    yield from _misfits(key, options, _FOLDERS)
    if str(options.get("_component_")).startswith("torchtune."):
        yield from _misfits(key, options, _CHECKPOINTER_ARGUMENTS)


def _misfits(
    section: str, options: Mapping[str, Any], arguments: Mapping[str, Must]
) -> Iterator[InputError]:
    for name, must in arguments.items():
        if name in options and not must.holds(options[name]):
            yield InputError(
                f"{section}.{name}", options[name], f"must be {must.words}", "change it"
            )


def profiler_problems(options: Mapping[str, Any] | None) -> Iterator[InputError]:
    """Yield what is wrong with the arguments of torchtune's profiler; another's are its own.

    Args:
        options: The section ``profiler``.
    """
    arguments = dict(options or {})
    if arguments.pop("_component_", PROFILER) != PROFILER:
        return
    for name in arguments:
        key = f"profiler.{name}"
        if name not in _PROFILER_ARGUMENTS:
            yield InputError(key, NO_VALUE, "unknown key", did_you_mean(name, _PROFILER_ARGUMENTS))
    yield from _misfits("profiler", arguments, _PROFILER_ARGUMENTS)


def option_name_problems(rewards: Mapping[Any, Any]) -> Iterator[InputError]:
    """Yield the options of rewards whose names are no texts.

    Args:
        rewards: The section ``rewards``.
    """
    for name, entry in rewards.items():
        if not isinstance(entry, Mapping):
            continue
        for option in entry:
            if not isinstance(option, str):
                must = "must be a text, since it names an option"
                yield InputError(f"rewards.{name}", option, must, "rename it")


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
    """Yield the numbers in a section that are inf or nan, or beyond any float.

    Args:
        key: Of the section.
        value: What it holds, at any depth.
    """
    children: Any = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    elif type(value) in (int, float) and not is_number(value):
        yield InputError(key, value, "must be a finite number", "write one like 1e-5")
    for name, child in children:
        yield from not_finite_numbers(f"{key}.{name}", child)
