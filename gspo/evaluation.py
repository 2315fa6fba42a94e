"""Held-out evaluation with the sampler that trains: greedy accuracy and pass@k.

A completion is correct when it earns the full reward: all that its rewards of positive weight can
give, nothing taken off by one, and no call failed. Beside a format reward or a length penalty that
is stricter than a right answer, which ``eval/reward``, the mean, is not. Nothing here touches the
training graph or its random state.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gspo.data.sample import prompt_seed
from gspo.data.score import full_rewards, reward_items
from gspo.metrics import Mean, Metrics, Sum
from gspo.rewards.pool import Scorer
from gspo.sampling import Sampler
from gspo.types import Completion, Group, Prompt, SamplingParams

# The same draws at every evaluation, so that two of them differ by the policy alone.
_SEED = 20250718


@dataclass(frozen=True)
class _Scores:
    """The scores of some prompts' completions."""

    num_solved: int  # prompts with a completion that is correct
    num_correct: int  # completions
    total_reward: float
    num_failures: int  # reward calls
    rewards: list[float]  # of each completion
    is_correct: list[bool]  # of each completion


def evaluate(
    sampler: Sampler,
    pool: Scorer,
    prompts: list[Prompt],
    *,
    params: SamplingParams,
    num_samples: int = 0,
    on_greedy: Callable[[list[dict[str, Any]]], object] | None = None,
) -> Metrics:
    """Return the metrics of this rank's prompts.

    ``eval/accuracy`` and ``eval/reward`` are of the greedy completions; with ``num_samples`` > 0
    there are ``eval/pass@k`` and ``eval/sampled_accuracy`` too. ``eval/reward_failures`` counts
    failed calls, whose value is 0.

    Args:
        sampler: holds the weights to be evaluated.
        pool: scores the completions.
        prompts: this rank's share; may be empty.
        params: of the sampled completions; the greedy ones keep only its length limit.
        num_samples: k, completions drawn for each prompt.
        on_greedy: called with a row for each prompt and its greedy completion.
    """
    num_prompts = len(prompts)
    greedy_params = replace(params, temperature=0.0)
    completions = _draw(sampler, prompts, 1, greedy_params)
    greedy = _score(pool, prompts, completions)
    if on_greedy is not None:
        on_greedy(_rows(prompts, completions, greedy))
    num_failures = greedy.num_failures
    metrics: Metrics = {
        "eval/accuracy": Mean(greedy.num_solved, num_prompts),
        "eval/reward": Mean(greedy.total_reward, num_prompts),
    }
    if num_samples:
        completions = _draw(sampler, prompts, num_samples, params)
        sampled = _score(pool, prompts, completions)
        num_failures += sampled.num_failures
        num_drawn = num_prompts * num_samples
        metrics[f"eval/pass@{num_samples}"] = Mean(sampled.num_solved, num_prompts)
        metrics["eval/sampled_accuracy"] = Mean(sampled.num_correct, num_drawn)
    metrics["eval/reward_failures"] = Sum(num_failures)
    return metrics


def _draw(
    sampler: Sampler, prompts: list[Prompt], group_size: int, params: SamplingParams
) -> list[list[Completion]]:
    """Draw the completions, without a call of the sampler where there are no prompts."""
    if not prompts:
        return []
    # A seed is of the prompt, not of its place, so that the number of ranks does not matter.
    seeds = []
    for prompt in prompts:
        digest = zlib.crc32(prompt.id.encode())
        seed = prompt_seed(_SEED, digest)
        seeds.append(seed)
    return sampler.sample(prompts, group_size=group_size, params=params, seeds=seeds)


def _score(pool: Scorer, prompts: list[Prompt], completions: Sequence[list[Completion]]) -> _Scores:
    groups: list[Group] = []
    for prompt, of_prompt in zip(prompts, completions, strict=True):
        number = len(groups)
        group = Group(number, prompt, of_prompt)
        groups.append(group)
    items = reward_items(groups)
    result = pool.score(items)
    is_correct = full_rewards(pool, result)
    flags = iter(is_correct)
    num_solved = 0
    num_correct = 0
    for of_prompt in completions:
        num_full = sum(next(flags) for _ in of_prompt)
        num_correct += num_full
        if num_full:
            num_solved += 1
    total_reward = sum(result.totals)
    num_failures = sum(result.failures.values())
    rewards = list(result.totals)
    return _Scores(num_solved, num_correct, total_reward, num_failures, rewards, is_correct)


def _rows(
    prompts: list[Prompt], completions: list[list[Completion]], scores: _Scores
) -> list[dict[str, Any]]:
    rows = []
    for prompt, drawn, reward, is_correct in zip(
        prompts, completions, scores.rewards, scores.is_correct, strict=True
    ):
        rows.append(
            {
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "completion": drawn[0].text,
                "answer": prompt.answer,
                "reward": reward,
                "correct": is_correct,
            }
        )
    return rows
