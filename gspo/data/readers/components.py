"""The readers that a config names, each with the keywords of its source and the reader's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gspo.data.readers.huggingface import HuggingFaceRows
from gspo.data.readers.jsonl import JsonlRows
from gspo.data.readers.parquet import ParquetRows
from gspo.data.readers.procedural import ReasoningGymMixtureRows, ReasoningGymRows
from gspo.data.readers.reader import PromptReader
from gspo.data.readers.rows import Rows
from gspo.data.readers.template import Encoder
from gspo.errors import InputError, did_you_mean

_Parameters = dict[str, inspect.Parameter]


def _component(name: str, make_rows: Callable[..., Rows]) -> Callable[..., PromptReader]:
    """Make a component with the keywords of ``make_rows`` and of PromptReader on one level.

    It carries the joint signature, so that ``tune validate`` and ``help`` see every keyword.
    """
    of_rows = dict(inspect.signature(make_rows).parameters)
    of_reader = dict(inspect.signature(PromptReader).parameters)
    del of_reader["rows"], of_reader["tokenizer"]

    def component(tokenizer: Encoder, **options: Any) -> PromptReader:
        _check_options(name, options, of_rows, of_reader)
        rows = make_rows(**_pick(options, of_rows))
        return PromptReader(rows, tokenizer, **_pick(options, of_reader))

    component.__name__ = component.__qualname__ = name
    component.__signature__ = _joint_signature(of_rows, of_reader)  # type: ignore[attr-defined]
    component.__doc__ = (
        f"{make_rows.__doc__}\n\nThe other keywords are those of :class:`PromptReader`."
    )
    return component


def _pick(options: Mapping[str, Any], parameters: _Parameters) -> dict[str, Any]:
    """Return the options that are named among ``parameters``."""
    return {key: value for key, value in options.items() if key in parameters}


def _check_options(
    name: str, options: Mapping[str, Any], of_rows: _Parameters, of_reader: _Parameters
) -> None:
    known = [*of_rows, *of_reader]
    for key in options:
        if key not in known:
            hint = did_you_mean(key, known)
            raise InputError(key, must=f"{name} takes no such argument", remedy=hint)
    for key, parameter in of_rows.items():
        is_required = parameter.default is parameter.empty
        if is_required and key not in options:
            raise InputError(key, must=f"{name} needs this argument")


def _joint_signature(of_rows: _Parameters, of_reader: _Parameters) -> inspect.Signature:
    parameters = [
        inspect.Parameter(
            "tokenizer", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Encoder"
        )
    ]
    for parameter in (*of_rows.values(), *of_reader.values()):
        parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    return inspect.Signature(parameters)


jsonl_prompts = _component("jsonl_prompts", JsonlRows)
parquet_prompts = _component("parquet_prompts", ParquetRows)
huggingface_prompts = _component("huggingface_prompts", HuggingFaceRows)
reasoning_gym_prompts = _component("reasoning_gym_prompts", ReasoningGymRows)
reasoning_gym_mixture_prompts = _component("reasoning_gym_mixture_prompts", ReasoningGymMixtureRows)
