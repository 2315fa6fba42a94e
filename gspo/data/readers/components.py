"""The readers that a config names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from gspo.data.readers.huggingface import HuggingFaceRows
from gspo.data.readers.jsonl import JsonlRows
from gspo.data.readers.parquet import ParquetRows
from gspo.data.readers.procedural import ReasoningGymRows
from gspo.data.readers.reader import Encoder, PromptReader
from gspo.data.readers.rows import Rows
from gspo.errors import InputError, did_you_mean


def _component(name: str, rows: Callable[..., Rows]) -> Callable[..., PromptReader]:
    """A component with the keywords of ``rows`` and of :class:`PromptReader` on one level.

    It carries the joint signature, so that ``tune validate`` and ``help`` see every keyword.
    """
    of_rows = inspect.signature(rows).parameters
    of_reader = {
        k: p
        for k, p in inspect.signature(PromptReader).parameters.items()
        if k not in ("rows", "tokenizer")
    }
    known = [*of_rows, *of_reader]

    def component(tokenizer: Encoder, **options: Any) -> PromptReader:
        for key in options:
            if key not in known:
                raise InputError(f"{key}: {name} takes no such argument.{did_you_mean(key, known)}")
        missing = [k for k, p in of_rows.items() if p.default is p.empty and k not in options]
        if missing:
            raise InputError(f"{missing[0]}: {name} needs this argument")
        source = rows(**{k: v for k, v in options.items() if k in of_rows})
        return PromptReader(
            source, tokenizer, **{k: v for k, v in options.items() if k in of_reader}
        )

    keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in (*of_rows.values(), *of_reader.values())]
    tokenizer = inspect.Parameter(
        "tokenizer", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Encoder"
    )
    component.__name__ = component.__qualname__ = name
    component.__signature__ = inspect.Signature([tokenizer, *keywords])  # type: ignore[attr-defined]
    component.__doc__ = f"{rows.__doc__}\n\nThe other keywords are those of :class:`PromptReader`."
    return component


jsonl_prompts = _component("jsonl_prompts", JsonlRows)


parquet_prompts = _component("parquet_prompts", ParquetRows)


huggingface_prompts = _component("huggingface_prompts", HuggingFaceRows)


reasoning_gym_prompts = _component("reasoning_gym_prompts", ReasoningGymRows)
