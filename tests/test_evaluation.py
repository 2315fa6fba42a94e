from types import SimpleNamespace

import pytest

from gspo.evaluation import evaluate
from gspo.metrics import Mean, Sum
from gspo.types import SamplingParams
from tests.data.fakes import completion, prompt

PARAMS = SamplingParams(temperature=0.7, max_new_tokens=5)


class Sampler:
    """Answers of prompt i: right in the first i of its completions. Remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def sample(self, prompts, *, group_size, params, seeds):
        self.calls.append((group_size, params.temperature, params.max_new_tokens, seeds))
        return [
            [completion(text=str(int(j < int(p.answer)))) for j in range(group_size)]
            for p in prompts
        ]


class Pool:
    """A right answer earns 1.5 of 1.5, and a wrong one 1.0: only the full reward is right.

    Wrong ones fail twice.
    """

    full_reward = 1.5

    def score(self, items):
        totals = [1.5 if text == "1" else 1.0 for _, text, _, _ in items]
        return SimpleNamespace(
            totals=totals,
            failed=[total == 1.0 for total in totals],
            failures={"raised": totals.count(1.0), "nonfinite": totals.count(1.0)},
        )


def test_evaluation_counts_full_rewards_only():
    metrics = evaluate(
        Sampler(), Pool(), [prompt(i) for i in (0, 1, 2, 3)], params=PARAMS, num_samples=3
    )
    assert metrics == {
        "eval/accuracy": Mean(3, 4),
        "eval/reward": Mean(5.5, 4),
        "eval/pass@3": Mean(3, 4),
        "eval/sampled_accuracy": Mean(6, 12),
        "eval/reward_failures": Sum(2 * (1 + 6)),
    }


def test_completion_with_a_failed_call_is_not_correct():
    class Failing(Pool):
        full_reward = 1.0  # a wrong answer earns it too, by a penalty whose call fails

    metrics = evaluate(Sampler(), Failing(), [prompt(0), prompt(1)], params=PARAMS, num_samples=2)
    assert metrics["eval/accuracy"] == Mean(1, 2)
    assert metrics["eval/sampled_accuracy"] == Mean(1, 4)


def test_evaluation_is_greedy_and_repeats_its_draws():
    sampler = Sampler()
    for _ in range(2):
        evaluate(sampler, Pool(), [prompt(1)], params=PARAMS, num_samples=4)
    greedy, sampled = sampler.calls[:2]
    assert greedy[:3] == (1, 0.0, 5) and sampled[:3] == (4, 0.7, 5)
    assert sampler.calls[2:] == [greedy, sampled]


@pytest.mark.parametrize("num_samples", [0, 2])
def test_rank_without_prompts_draws_nothing_and_counts_alike(num_samples):
    sampler = Sampler()
    metrics = evaluate(sampler, Pool(), [], params=PARAMS, num_samples=num_samples)
    assert sampler.calls == [] and not any(metric.value for metric in metrics.values())
    other = evaluate(sampler, Pool(), [prompt(1)], params=PARAMS, num_samples=num_samples)
    assert metrics.keys() == other.keys()  # the ranks' columns must agree
    weighted = {name for name, metric in metrics.items() if metric.weight}
    assert weighted == {"eval/reward_failures"}  # no weight in a mean
