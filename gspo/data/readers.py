"""Prompt readers: JSONL, Parquet, Hugging Face datasets and reasoning-gym.

One node, :class:`PromptReader`, does everything that readers share; a source only gives rows by index. The functions
that a config names (``jsonl_prompts`` and so on) put the two together from one flat set of keywords.

Prompts are text from a template and not chat messages: a chat model's turn markers belong into the template. A special
token of the tokenizer that is written there becomes that one token.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import string
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torchdata.nodes import BaseNode

from gspo.errors import InputError, did_you_mean
from gspo.types import Prompt

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """A source of prompts: rows by index, and where each comes from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row's fields by name, for the template, the answer and the prompt's metadata."""
        ...

    def name(self, index: int) -> str:
        """A stable id that leads back to the source, e.g. ``train.jsonl:17``."""
        ...


class Encoder(Protocol):
    """The part of a torchtune tokenizer that readers use."""

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        """The token ids of ``text``."""
        ...


class PromptReader(BaseNode[Prompt]):
    """Yields the prompts of one data-parallel rank, epoch after epoch.

    Every epoch takes a fresh permutation of the rows, the same on all ranks, of which each rank takes its own strided
    part: no two ranks draw the same prompt in an epoch. Prompts are tokenised when they are drawn. Rows that are
    skipped for their length are counted in ``num_skipped``.

    Args:
        rows: the source.
        tokenizer: has torchtune's ``encode(text, add_bos=, add_eos=)``.
        prompt_template: a format string over the row's fields; a literal brace is doubled. The tokenizer's special
            tokens may stand in it.
        answer_column: the field that holds the reference answer; None for prompts without one.
        add_bos: put the tokenizer's begin-of-sequence token first.
        max_prompt_tokens: the longest prompt allowed, in tokens; None for no limit.
        on_long_prompt: ``error`` or ``skip``.
        shuffle: permute the rows; else they come in their order.
        seed: of the permutations.
        rank: of this process among the data-parallel ranks.
        world_size: data-parallel ranks.
        num_epochs: passes over the rows; None for no end.

    Raises:
        InputError: on construction, a knob is out of range, there are fewer rows than ranks or the first row lacks a
            field; on drawing, a row lacks a field, or its prompt is too long or empty or begins twice, or a whole pass
            was skipped.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Encoder,
        *,
        prompt_template: str = "{question}",
        answer_column: str | None = "answer",
        add_bos: bool = True,
        max_prompt_tokens: int | None = None,
        on_long_prompt: str = "error",
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_epochs: int | None = None,
    ) -> None:
        super().__init__()
        if on_long_prompt not in ("error", "skip"):
            raise InputError(f"on_long_prompt: {on_long_prompt!r} must be 'error' or 'skip'")
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise InputError(f"max_prompt_tokens: {max_prompt_tokens} must be at least 1, or null for no limit")
        if not 0 <= rank < world_size:
            raise InputError(f"rank: {rank} must be at least 0 and less than world_size: {world_size}")
        if len(rows) < world_size:
            raise InputError(
                f"{rows.name(0)}: {len(rows)} rows are too few for {world_size} data-parallel ranks, "
                "which draw different prompts; add rows or use fewer ranks"
            )
        self._rows = rows
        self._tokenizer = tokenizer
        self._template = prompt_template
        self._fields = _template_fields(prompt_template)
        self._pieces = _template_pieces(prompt_template, tokenizer)
        self._answer_column = answer_column
        self._add_bos = add_bos
        self._max_prompt_tokens = max_prompt_tokens
        self._on_long_prompt = on_long_prompt
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_epochs = num_epochs
        self._check_fields(rows[0], rows.name(0))  # a wrong column shows at start, not at step 1,000

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on where ``initial_state`` was taken.

        Raises:
            InputError: the state is of another number of rows or ranks.
        """
        super().reset(initial_state)
        state = initial_state or {}
        for key, found in (("num_rows", len(self._rows)), ("world_size", self._world_size)):
            if state.get(key, found) != found:
                raise InputError(
                    f"the prompt reader's saved state has {key} {state[key]}, this run has {found}; "
                    "resume with the same data and ranks, or start the data anew"
                )
        self._epoch: int = state.get("epoch", 0)
        self._position: int = state.get("position", 0)  # in this rank's part of the epoch's order
        self._num_yielded: int = state.get("num_yielded", 0)  # in this epoch
        self.num_skipped: int = state.get("num_skipped", 0)  # since the start
        self._order = self._epoch_order()

    def get_state(self) -> dict[str, Any]:
        """The place in the epochs, as plain integers."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "num_yielded": self._num_yielded,
            "num_skipped": self.num_skipped,
            "num_rows": len(self._rows),
            "world_size": self._world_size,
        }

    def next(self) -> Prompt:
        """The next prompt that is not skipped."""
        while True:
            if self._position == len(self._order):
                self._end_epoch()
            if self._num_epochs is not None and self._epoch >= self._num_epochs:
                raise StopIteration
            index = int(self._order[self._position])
            self._position += 1
            prompt = self._prompt(index)
            if prompt is not None:
                self._num_yielded += 1
                return prompt

    def _epoch_order(self) -> np.ndarray:
        order = np.arange(len(self._rows))
        if self._shuffle:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(order)
        return order[self._rank :: self._world_size]

    def _end_epoch(self) -> None:
        if self._num_yielded == 0:
            raise InputError(
                f"{self._rows.name(0)}: all {len(self._order)} prompts of a pass are longer than "
                f"max_prompt_tokens: {self._max_prompt_tokens} and were skipped; raise it or shorten the prompts"
            )
        self._epoch += 1
        self._position = self._num_yielded = 0
        self._order = self._epoch_order()

    def _prompt(self, index: int) -> Prompt | None:
        row, name = self._rows[index], self._rows.name(index)
        self._check_fields(row, name)
        text = self._template.format_map(row)
        tokens = self._encode(row)
        if not tokens:
            raise InputError(f"{name}: the prompt {text!r} has no tokens; a sampler needs one, e.g. add_bos: true")
        if len(tokens) > 1 and tokens[0] == tokens[1] == getattr(self._tokenizer, "bos_id", None):
            raise InputError(
                f"prompt_template: {name} begins with the token {tokens[0]} (begin of sequence) twice; "
                "take it out of the template, the tokenizer adds it, or set add_bos: false"
            )
        if self._max_prompt_tokens is not None and len(tokens) > self._max_prompt_tokens:
            self._handle_long(name, len(tokens))
            return None
        answer = None if self._answer_column is None else row[self._answer_column]
        return Prompt(name, text, tokens, None if answer is None else str(answer), row)

    def _encode(self, row: Mapping[str, Any]) -> list[int]:
        if len(self._pieces) == 1:
            return self._tokenizer.encode(self._template.format_map(row), add_bos=self._add_bos, add_eos=False)
        bos_id = getattr(self._tokenizer, "bos_id", None)
        tokens = [bos_id] if self._add_bos and bos_id is not None else []
        for piece in self._pieces:
            if isinstance(piece, int):
                tokens.append(piece)
            else:
                tokens += self._tokenizer.encode(piece.format_map(row), add_bos=False, add_eos=False)
        return tokens

    def _check_fields(self, row: Mapping[str, Any], name: str) -> None:
        wanted = [("prompt_template", field) for field in self._fields]
        if self._answer_column is not None:
            wanted.append(("answer_column", self._answer_column))
        for key, field in wanted:
            if field not in row:
                raise InputError(f"{key}: {name} has no field {field!r}; it has {', '.join(map(repr, row))}")

    def _handle_long(self, name: str, num_tokens: int) -> None:
        if self._on_long_prompt == "error":
            raise InputError(
                f"{name}: the prompt has {num_tokens} tokens, more than max_prompt_tokens: {self._max_prompt_tokens}; "
                "raise it, shorten the prompt or set on_long_prompt: skip"
            )
        if self.num_skipped == 0:
            logger.warning(
                "%s: skipped, %d tokens are more than max_prompt_tokens: %d. More are counted and not logged.",
                name,
                num_tokens,
                self._max_prompt_tokens,
            )
        self.num_skipped += 1


def _template_fields(template: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise InputError(f"prompt_template: {template!r}: {error}; double a brace that is text") from error
    fields = [name.replace("[", ".").partition(".")[0] for name in names]
    if "" in fields or not fields:
        raise InputError(f"prompt_template: {template!r} must name the row's fields, e.g. '{{question}}'")
    return fields


def _template_pieces(template: str, tokenizer: Any) -> list[str | int]:
    """The template cut at the special tokens written in it, which are given by id.

    Not every ``encode`` finds them: torchtune's for Llama 3 takes ``<|eot_id|>`` for plain text.
    """
    special_tokens = getattr(tokenizer, "special_tokens", None)
    if not special_tokens or not isinstance(special_tokens, dict):
        return [template]
    longest_first = sorted(special_tokens, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", template)
    return [special_tokens[piece] if piece in special_tokens else piece for piece in pieces if piece]


class JsonlRows:
    """One JSON object per line; blank lines are passed over.

    Opening reads the file once and parses every line, so that a bad one shows before the run and not during it; what
    stays in memory is 16 bytes per row.
    """

    def __init__(self, source: str) -> None:
        self._path = _existing(source)
        self._offsets, self._lines = array("q"), array("q")
        offset = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._parse(line, number)
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        _require_rows(self, source)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            return self._parse(file.readline(), self._lines[index])

    def name(self, index: int) -> str:
        """The file's name and the line."""
        return f"{self._path.name}:{self._lines[index]}"

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are two
            raise InputError(f"{self._path}:{number}: not JSON: {error}; the line is {line[:80]!r}") from error
        if not isinstance(row, dict):
            raise InputError(f"{self._path}:{number}: a {type(row).__name__}, not a JSON object: {line[:80]!r}")
        return row


class ParquetRows:
    """A Parquet file, or a directory of them, held in memory as an Arrow table."""

    def __init__(self, source: str) -> None:
        import pyarrow
        import pyarrow.parquet

        path = _existing(source)
        try:
            self._table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{source}: not readable as Parquet: {error}") from error
        self._stem = path.name
        _require_rows(self, source)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._table.slice(index, 1).to_pylist()[0]

    def name(self, index: int) -> str:
        """The source and the row, from 0."""
        return f"{self._stem}:{index}"


class HuggingFaceRows:
    """A split of a dataset: a name on the hub, or a local directory of data files or of ``save_to_disk``."""

    def __init__(self, source: str, split: str = "train", subset: str | None = None) -> None:
        import datasets

        directory = Path(source)
        saved = (directory / "state.json").exists() or (directory / "dataset_dict.json").exists()
        try:
            found = datasets.load_from_disk(source) if saved else datasets.load_dataset(source, subset, split=split)
        except Exception as error:  # the library raises its own, the hub's, fsspec's and the parsers' errors
            raise InputError(
                f"source: {source!r} (split {split!r}, subset {subset!r}) does not load as a Hugging Face dataset: "
                f"{type(error).__name__}: {error}"
            ) from error
        if isinstance(found, dict):
            if split not in found:
                raise InputError(f"split: {source!r} has no {split!r}.{did_you_mean(split, found)}")
            found = found[split]
        self._dataset = found
        self._stem = f"{source}/{split}" if subset is None else f"{source}/{subset}/{split}"
        _require_rows(self, source)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._dataset[index])

    def name(self, index: int) -> str:
        """The source and the row, from 0."""
        return f"{self._stem}:{index}"


class ReasoningGymRows:
    """Procedurally generated tasks of reasoning-gym.

    A row's fields are ``question``, ``answer``, those of the task's metadata, and ``entry``: the whole entry, which
    :func:`gspo.rewards.reasoning_gym` scores by.
    """

    def __init__(
        self, name: str, size: int = 500, dataset_seed: int = 0, dataset_options: Mapping[str, Any] | None = None
    ) -> None:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if name not in DATASETS:
            raise InputError(f"name: reasoning-gym has no {name!r}.{did_you_mean(name, DATASETS)}")
        if size < 1:
            raise InputError(f"size: {size} must be at least 1")
        try:
            self._dataset = reasoning_gym.create_dataset(
                name, size=size, seed=dataset_seed, **dict(dataset_options or {})
            )
        except (TypeError, ValueError, AssertionError) as error:  # what its configs refuse values with
            raise InputError(f"dataset_options: reasoning-gym's {name} refuses {dataset_options}: {error}") from error
        self._name = name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self._dataset[index]
        return {**entry["metadata"], "question": entry["question"], "answer": entry["answer"], "entry": entry}

    def name(self, index: int) -> str:
        """The task and the row, from 0."""
        return f"reasoning_gym/{self._name}:{index}"


def _existing(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(f"source: {source} does not exist (looked for {path.absolute()})")
    return path


def _require_rows(rows: Rows, source: str) -> None:
    if len(rows) == 0:
        raise InputError(f"source: {source} is empty; a run needs at least one prompt")


def _component(name: str, rows: Callable[..., Rows]) -> Callable[..., PromptReader]:
    """A component with the keywords of ``rows`` and of :class:`PromptReader` on one level.

    It carries the joint signature, so that ``tune validate`` and ``help`` see every keyword.
    """
    of_rows = inspect.signature(rows).parameters
    of_reader = {k: p for k, p in inspect.signature(PromptReader).parameters.items() if k not in ("rows", "tokenizer")}
    known = [*of_rows, *of_reader]

    def component(tokenizer: Encoder, **options: Any) -> PromptReader:
        for key in options:
            if key not in known:
                raise InputError(f"{key}: {name} takes no such argument.{did_you_mean(key, known)}")
        missing = [k for k, p in of_rows.items() if p.default is p.empty and k not in options]
        if missing:
            raise InputError(f"{missing[0]}: {name} needs this argument")
        source = rows(**{k: v for k, v in options.items() if k in of_rows})
        return PromptReader(source, tokenizer, **{k: v for k, v in options.items() if k in of_reader})

    keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in (*of_rows.values(), *of_reader.values())]
    tokenizer = inspect.Parameter("tokenizer", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Encoder")
    component.__name__ = component.__qualname__ = name
    component.__signature__ = inspect.Signature([tokenizer, *keywords])  # type: ignore[attr-defined]
    component.__doc__ = f"{rows.__doc__}\n\nThe other keywords are those of :class:`PromptReader`."
    return component


jsonl_prompts = _component("jsonl_prompts", JsonlRows)
parquet_prompts = _component("parquet_prompts", ParquetRows)
huggingface_prompts = _component("huggingface_prompts", HuggingFaceRows)
reasoning_gym_prompts = _component("reasoning_gym_prompts", ReasoningGymRows)
