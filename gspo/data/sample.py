"""Prompts in, rollouts out: calls the sampler and refuses what the trainer would not reproduce.

What is not here: which prompts this rank draws (the reader's), rewards (:mod:`gspo.data.score`).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from torchdata.nodes import BaseNode

from gspo.errors import InputError
from gspo.sampling import Sampler
from gspo.types import Completion, Group, Prompt, Rollout, SamplingParams

_RANK_SHIFT = 40  # group ids: the rank above bit 40, a running number below, so that they are unique over ranks


class Sample(BaseNode[Rollout]):
    """Draws ``group_size`` completions for each of ``prompts_per_rollout`` prompts of ``source``.

    A source that ends early gives one short rollout. The seed of a prompt depends on ``seed`` and the prompt's number
    over all ranks only: a resumed run draws what the uninterrupted one would have, and several ranks, of which each
    takes every ``world_size``-th prompt, draw what one would.

    Args:
        source: a node of :class:`~gspo.types.Prompt`.
        sampler: what completes them; called on the thread that draws from this node.
        prompts_per_rollout: prompts in one call of the sampler, on this rank.
        group_size: completions for each prompt.
        params: how to draw; greedy decoding and cut distributions (top_p, top_k) cannot be trained on.
        seed: of the run, 0 or more.
        rank: data-parallel rank.
        world_size: data-parallel ranks.
        tokenizer: the trainer's tokenizer fingerprint, which completions must carry; None does not compare.
        max_tokens: longest document, prompt and completion, that the packer takes; None does not compare.

    Raises:
        InputError: a bad argument; from ``next``, a prompt or a completion that cannot be trained on.
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
        _check_at_least("prompts_per_rollout", prompts_per_rollout, 1)
        _check_at_least("group_size", group_size, 1)
        _check_at_least("seed", seed, 0)
        _check_at_least("rank", rank, 0)
        check_params(params)
        self.source, self.sampler, self.params = source, sampler, params
        self.prompts_per_rollout, self.group_size = prompts_per_rollout, group_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self._num_rollouts = 0

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on from a state."""
        super().reset(initial_state)
        self.source.reset(None if initial_state is None else initial_state["source"])
        self._num_rollouts = 0 if initial_state is None else initial_state["num_rollouts"]

    def get_state(self) -> dict[str, Any]:
        """The source's state and the number of rollouts drawn."""
        return {"source": self.source.state_dict(), "num_rollouts": self._num_rollouts}

    def next(self) -> Rollout:
        """The next rollout."""
        prompts = self._draw_prompts()
        started = time.perf_counter()
        numbers = self._num_rollouts * self.prompts_per_rollout + np.arange(len(prompts))
        seeds = [prompt_seed(self.seed, int(n) * self.world_size + self.rank) for n in numbers]
        answers = self.sampler.sample(
            prompts, group_size=self.group_size, params=self.params, seeds=seeds
        )
        seconds = time.perf_counter() - started
        self._check_answers(prompts, answers)
        first_id = (self.rank << _RANK_SHIFT) + self._num_rollouts * self.prompts_per_rollout
        self._num_rollouts += 1
        groups = [Group(first_id + i, prompt, answers[i]) for i, prompt in enumerate(prompts)]
        return Rollout(groups, stats={"time/sample": (seconds, 1.0), **length_stats(groups)})

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

    def _check_prompt(self, prompt: Prompt) -> None:
        num_tokens = len(prompt.tokens)
        if num_tokens == 0:
            raise InputError(
                f"prompt {prompt.id} has no tokens. A completion's first token needs one before it."
            )
        if (
            self.max_tokens is not None
            and num_tokens + self.params.max_new_tokens > self.max_tokens
        ):
            raise InputError(
                f"prompt {prompt.id} has {num_tokens} tokens, which with max_new_tokens {self.params.max_new_tokens} "
                f"is more than the {self.max_tokens} that one bin takes. Raise tokens_per_microbatch (and bin_length), "
                f"lower max_new_tokens, or leave the prompt out."
            )

    def _check_answers(self, prompts: list[Prompt], answers: list[list[Completion]]) -> None:
        sizes = [len(completions) for completions in answers]
        if sizes != [self.group_size] * len(prompts):
            raise InputError(
                f"sampler: {type(self.sampler).__name__}.sample was asked for {self.group_size} completions of each of "
                f"{len(prompts)} prompts and gave groups of {sizes}. It must give one list per prompt, in their order."
            )
        for prompt, completions in zip(prompts, answers, strict=True):
            for completion in completions:
                check_completion(completion, prompt.id, tokenizer=self.tokenizer)


def prompt_seed(seed: int, number: int) -> int:
    """The seed of one prompt's completions, in [0, 2^63): the same for the same two numbers on any machine."""
    words = np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def length_stats(groups: list[Group]) -> dict[str, tuple[float, float]]:
    """``length/mean``, ``length/max`` (tokens sampled, the stop token included) and ``length/truncated`` (share)."""
    completions = [c for group in groups for c in group.completions]
    lengths = [len(c.tokens) for c in completions]
    num_truncated = sum(c.finish_reason == "length" for c in completions)
    return {
        "length/mean": (float(sum(lengths)), float(len(lengths))),
        "length/max": (float(max(lengths, default=0)), 1.0),
        "length/truncated": (float(num_truncated), float(len(lengths))),
    }


def check_completion(
    completion: Completion, prompt_id: str, *, tokenizer: str | None = None
) -> None:
    """Refuse a completion whose log-probabilities the trainer would not reproduce. Readers of records use it too.

    The trainer computes log-probabilities of the whole softmax at the record's temperature.

    Args:
        completion: the record; its numbers are not checked for being finite, see :mod:`gspo.data.advantage`.
        prompt_id: for the message.
        tokenizer: fingerprint that the record must carry; None does not compare.

    Raises:
        InputError: naming the field, the value found and the value needed.
    """
    check_sampling(completion, f"a completion of prompt {prompt_id}: ")
    if completion.logps_of not in ("processed", "raw"):
        _refuse(prompt_id, "logps_of", completion.logps_of, "'processed' or 'raw'")
    if completion.logps_of == "raw" and completion.temperature != 1.0:
        _refuse(
            prompt_id,
            "logps_of",
            "raw",
            f"'processed' at temperature {completion.temperature} (or temperature 1)",
        )
    if tokenizer is not None and completion.tokenizer != tokenizer:
        _refuse(prompt_id, "tokenizer", completion.tokenizer, f"{tokenizer!r}, the trainer's")
    if len(completion.logps) != len(completion.tokens):
        needed = f"{len(completion.tokens)} values, one for each of its tokens"
        raise InputError(
            f"a completion of prompt {prompt_id} has logps: {len(completion.logps)} values, needed: {needed}"
        )
    if completion.finish_reason not in ("stop", "length"):
        _refuse(prompt_id, "finish_reason", completion.finish_reason, "'stop' or 'length'")


def check_params(params: SamplingParams) -> None:
    """Refuse what cannot be drawn with or not be trained on.

    Raises:
        InputError: naming the key in ``sampling``, the value found and the value needed.
    """
    if type(params.max_new_tokens) is not int or params.max_new_tokens < 1:
        raise InputError(
            f"sampling.max_new_tokens: {params.max_new_tokens!r} must be a whole number of 1 or more"
        )
    if isinstance(params.temperature, bool) or not isinstance(params.temperature, int | float):
        raise InputError(f"sampling.temperature: {params.temperature!r} must be a number above 0")
    check_sampling(params, "sampling.")


def check_sampling(sampled: SamplingParams | Completion, where: str) -> None:
    """Refuse greedy decoding and cut distributions: their log-probabilities are not the trainer's softmax.

    ``where`` stands before the field in the message.

    Raises:
        InputError: naming the field, the value found and the value needed.
    """
    if not 0.0 < sampled.temperature < float("inf"):
        raise InputError(
            f"{where}temperature is {sampled.temperature}, needed: above 0 (1.0 samples the model as it is)."
        )
    if sampled.top_p != 1.0:
        raise InputError(
            f"{where}top_p is {sampled.top_p}, needed: 1.0, as the trainer computes the whole softmax."
        )
    if sampled.top_k != 0:
        raise InputError(
            f"{where}top_k is {sampled.top_k}, needed: 0, as the trainer computes the whole softmax."
        )


def _refuse(prompt_id: str, name: str, found: Any, needed: str) -> None:
    raise InputError(f"a completion of prompt {prompt_id} has {name}: {found!r}, needed: {needed}")


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name}: {value} is too small. Set it to {least} or more.")
