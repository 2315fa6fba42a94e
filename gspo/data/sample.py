"""Prompts in, groups out: calls the sampler and refuses what the trainer would not reproduce.

Not here: which prompts this rank draws (the reader's), rewards (:mod:`gspo.data.score`).
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from torchdata.nodes import BaseNode

from gspo.errors import DataError, InputError, require
from gspo.metrics import Max, Mean, Metrics, Time
from gspo.sampling import Sampler
from gspo.types import Completion, Group, GroupBatch, Prompt, SamplingParams

# Group ids have the rank above bit 40 and a running number below: unique over ranks.
_RANK_SHIFT = 40
_WHOLE_SOFTMAX = "the trainer computes the whole softmax"


class Sample(BaseNode[GroupBatch]):
    """A node that draws ``group_size`` completions for ``prompts_per_rollout`` prompts at a time.

    A source that ends early gives one short rollout. The seed of a prompt depends on ``seed`` and
    the prompt's number over all ranks only: a resumed run draws what the uninterrupted one would
    have, and several ranks, of which each takes every ``world_size``-th prompt, draw what one
    would.

    Args:
        source: a node of :class:`~gspo.types.Prompt`.
        sampler: completes the prompts; called on the thread that draws from this node.
        prompts_per_rollout: prompts in one call of the sampler, on this rank.
        group_size: completions for each prompt.
        params: how to draw; greedy decoding cannot be trained on.
        seed: of the run, 0 or more.
        rank: data-parallel rank.
        world_size: data-parallel ranks.
        tokenizer: the trainer's tokenizer fingerprint, which completions must carry; None does not
            compare.
        max_tokens: longest document, prompt and completion, that the packer takes; None does not
            compare.

    Raises:
        InputError: A bad argument. From ``next``: a prompt or a completion that cannot be trained
            on.
    """

    def __init__(
        self,
        source: BaseNode[Prompt],
        sampler: Sampler,
        *,
        prompts_per_rollout: int,
        group_size: int,
        params: SamplingParams,
        seed: int,
        rank: int,
        world_size: int = 1,
        tokenizer: str | None = None,
        max_tokens: int | None = None,
    ) -> None:
        super().__init__()
        _require_at_least(1, "prompts_per_rollout", prompts_per_rollout)
        _require_at_least(1, "group_size", group_size)
        _require_at_least(0, "seed", seed)
        _require_at_least(0, "rank", rank)
        check_params(params)
        self.source = source
        self.sampler = sampler
        self.params = params
        self.prompts_per_rollout = prompts_per_rollout
        self.group_size = group_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._num_rollouts = 0

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on from a state."""
        super().reset(initial_state)
        self.source.reset(None if initial_state is None else initial_state["source"])
        self._num_rollouts = 0 if initial_state is None else initial_state["num_rollouts"]

    def get_state(self) -> dict[str, Any]:
        """Return the source's state and the number of rollouts drawn."""
        return {"source": self.source.state_dict(), "num_rollouts": self._num_rollouts}

    def next(self) -> GroupBatch:
        """Return the next groups."""
        prompts = self._draw_prompts()
        first_number = self._num_rollouts * self.prompts_per_rollout
        start = time.perf_counter()
        completions = self.sampler.sample(
            prompts,
            group_size=self.group_size,
            params=self.params,
            seeds=self._seeds(first_number, len(prompts)),
        )
        seconds = time.perf_counter() - start
        self._check_completions(prompts, completions)
        self._num_rollouts += 1
        first_id = (self.rank << _RANK_SHIFT) + first_number
        groups = [Group(first_id + i, prompt, completions[i]) for i, prompt in enumerate(prompts)]
        return GroupBatch(groups, stats={"time/sample": Time(seconds), **length_stats(groups)})

    def _draw_prompts(self) -> list[Prompt]:
        prompts: list[Prompt] = []
        while len(prompts) < self.prompts_per_rollout:
            try:
                prompts.append(next(self.source))
            except StopIteration:
                break
        if not prompts:
            raise StopIteration
        for prompt in prompts:
            self._check_prompt(prompt)
        return prompts

    def _seeds(self, first_number: int, num_prompts: int) -> list[int]:
        """Return the seeds of this rank's prompts from ``first_number`` on."""
        seeds = []
        for number in range(first_number, first_number + num_prompts):
            number_over_ranks = number * self.world_size + self.rank
            seeds.append(prompt_seed(self.seed, number_over_ranks))
        return seeds

    def _check_prompt(self, prompt: Prompt) -> None:
        place = f"prompt {prompt.id}"
        num_tokens = len(prompt.tokens)
        if num_tokens == 0:
            raise DataError(
                place,
                must="has no tokens",
                remedy="a completion's first token needs one before it",
            )
        max_new_tokens = self.params.max_new_tokens
        if self.max_tokens is not None and num_tokens + max_new_tokens > self.max_tokens:
            raise DataError(
                place,
                must=f"has {num_tokens} tokens, which with max_new_tokens {max_new_tokens} is more "
                f"than the {self.max_tokens} that one bin takes",
                remedy="raise tokens_per_microbatch (and bin_length), lower max_new_tokens, or "
                "leave the prompt out",
            )

    def _check_completions(
        self, prompts: list[Prompt], completions: list[list[Completion]]
    ) -> None:
        sizes = [len(of_prompt) for of_prompt in completions]
        if sizes != [self.group_size] * len(prompts):
            raise InputError(
                "sampler",
                must=f"{type(self.sampler).__name__}.sample was asked for {self.group_size} "
                f"completions of each of {len(prompts)} prompts and gave groups of {sizes}",
                remedy="it must give one list per prompt, in their order",
            )
        for prompt, of_prompt in zip(prompts, completions, strict=True):
            for completion in of_prompt:
                check_completion(completion, prompt.id, tokenizer=self.tokenizer)


def prompt_seed(seed: int, number: int) -> int:
    """Return the seed of a prompt's completions, in [0, 2^63), the same on any machine.

    Args:
        seed: of the run.
        number: of the prompt over all ranks.
    """
    words = np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def length_stats(groups: list[Group]) -> Metrics:
    """Return the completions' lengths (tokens, stop token included) and the share cut short."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.tokens) for completion in completions]
    num_completions = float(len(completions))
    num_truncated = sum(completion.finish_reason == "length" for completion in completions)
    return {
        "length/mean": Mean(float(sum(lengths)), num_completions),
        "length/max": Max(float(max(lengths, default=0))),
        "length/truncated": Mean(float(num_truncated), num_completions),
    }


def check_completion(
    completion: Completion, prompt_id: str, *, tokenizer: str | None = None
) -> None:
    """Refuse a completion whose log-probabilities the trainer would not reproduce.

    The trainer computes log-probabilities of the whole softmax at the record's temperature. Readers
    of records use this check too.

    Args:
        completion: the record; its numbers are not checked for being finite, see
            :mod:`gspo.data.advantage`.
        prompt_id: for the message.
        tokenizer: fingerprint that the record must carry; None does not compare.

    Raises:
        DataError: The field, the value found and the value needed.
    """

    def need(condition: bool, field: str, needed: str, remedy: str = "") -> None:
        if not condition:
            place = f"a completion of prompt {prompt_id}"
            value = getattr(completion, field)
            raise DataError(place, must=f"{field} is {value!r}, needed: {needed}", remedy=remedy)

    temperature = completion.temperature
    need(_can_train_on(temperature), "temperature", "above 0", "1.0 samples the model as it is")
    need(completion.top_p == 1.0, "top_p", "1.0", _WHOLE_SOFTMAX)
    need(completion.top_k == 0, "top_k", "0", _WHOLE_SOFTMAX)
    need(completion.logps_of in ("processed", "raw"), "logps_of", "'processed' or 'raw'")
    need(
        completion.logps_of == "processed" or temperature == 1.0,
        "logps_of",
        f"'processed' at temperature {temperature} (or temperature 1)",
    )
    if tokenizer is not None:
        is_trainers = completion.tokenizer == tokenizer
        need(is_trainers, "tokenizer", f"{tokenizer!r}, the trainer's")
    _check_num_logps(completion, prompt_id)
    is_known = completion.finish_reason in ("stop", "length")
    need(is_known, "finish_reason", "'stop' or 'length'")


def _check_num_logps(completion: Completion, prompt_id: str) -> None:
    num_logps, num_tokens = len(completion.logps), len(completion.tokens)
    if num_logps != num_tokens:
        raise DataError(
            f"a completion of prompt {prompt_id}",
            must=f"logps are {num_logps} values, needed: {num_tokens} values",
            remedy="give one for each of its tokens",
        )


def check_params(params: SamplingParams) -> None:
    """Refuse greedy decoding, whose log-probabilities are not the trainer's softmax.

    Raises:
        InputError: The key in ``sampling``, the value found and the value needed.
    """
    _require_at_least(1, "max_new_tokens", params.max_new_tokens)
    require(
        _can_train_on(params.temperature),
        "temperature",
        params.temperature,
        "must be above 0",
        "1.0 samples the model as it is",
    )


def _can_train_on(temperature: float) -> bool:
    return 0.0 < temperature < math.inf


def _require_at_least(least: int, name: str, value: int) -> None:
    require(value >= least, name, value, "is too small", f"set it to {least} or more")
