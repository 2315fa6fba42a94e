"""Held-out evaluation with the sampler that trains: greedy accuracy and pass@k.

A completion is correct when it earns the full reward: all that its rewards of positive weight can give, and nothing
taken off by one. Beside a format reward or a length penalty that is stricter than a right answer, which
``eval/reward``, the mean, is not. Nothing here touches the training graph or its random state.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

from gspo.data.sample import prompt_seed
from gspo.data.score import FULL_REWARD_TOLERANCE, reward_items
from gspo.rewards.pool import RewardPool, RewardResult
from gspo.sampling import Sampler
from gspo.types import Completion, Group, Prompt, SamplingParams

_SEED = (
    20250718  # the same draws at every evaluation, so that two of them differ by the policy alone
)


def evaluate(
    sampler: Sampler,
    pool: RewardPool,
    prompts: list[Prompt],
    *,
    params: SamplingParams,
    num_samples: int = 0,
) -> dict[str, tuple[float, float]]:
    """Metric pairs of this rank's prompts.

    ``eval/accuracy`` and ``eval/reward`` are of the greedy completions; with ``num_samples`` > 0 there are
    ``eval/pass@k`` and ``eval/sampled_accuracy`` too. ``eval/reward_failures`` counts failed calls, whose value is 0.

    Args:
        sampler: holds the weights to be evaluated.
        pool: scores the completions.
        prompts: this rank's share; may be empty.
        params: of the sampled completions; the greedy ones keep only its length limit.
        num_samples: k, completions drawn for each prompt.
    """
    # Of the prompt, not of its place, so that the number of ranks does not matter.
    seeds = [prompt_seed(_SEED, zlib.crc32(prompt.id.encode())) for prompt in prompts]
    greedy_params = replace(params, temperature=0.0)
    greedy = (
        sampler.sample(prompts, group_size=1, params=greedy_params, seeds=seeds) if prompts else []
    )
    correct, result = _score(pool, prompts, greedy)
    num_failures = sum(result.failures.values())
    pairs = {
        "eval/accuracy": (float(sum(map(any, correct))), float(len(prompts))),
        "eval/reward": (sum(result.totals), float(len(prompts))),
    }
    if num_samples:
        drawn = (
            sampler.sample(prompts, group_size=num_samples, params=params, seeds=seeds)
            if prompts
            else []
        )
        correct, result = _score(pool, prompts, drawn)
        num_failures += sum(result.failures.values())
        pairs[f"eval/pass@{num_samples}"] = (float(sum(map(any, correct))), float(len(prompts)))
        pairs["eval/sampled_accuracy"] = (
            float(sum(map(sum, correct))),
            float(len(prompts) * num_samples),
        )
    return pairs | {"eval/reward_failures": (float(num_failures), 1.0)}


def _score(
    pool: RewardPool, prompts: list[Prompt], groups: list[list[Completion]]
) -> tuple[list[list[bool]], RewardResult]:
    """Whether each completion earns the full reward, and the rewards."""
    drawn = [
        Group(i, prompt, group)
        for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
    ]
    result = pool.score(reward_items(drawn))
    totals, full = iter(result.totals), pool.full_reward - FULL_REWARD_TOLERANCE
    return [[next(totals) >= full for _ in group] for group in groups], result
