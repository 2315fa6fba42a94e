import pytest
from torchdata.nodes import BaseNode

from gspo.data.score import Score, rewarded_stats
from gspo.metrics import Mean, Sum, Time
from gspo.rewards import RewardPool
from gspo.types import Completion, Group, GroupBatch, Prompt
from tests.data.law import assert_resumes_anywhere

REWARDS = {
    "correct": {"function": "gspo.rewards.exact_match", "weight": 1.0},
    "length": {
        "function": "gspo.rewards.overlong_penalty",
        "weight": 0.5,
        "max_tokens": 4,
        "buffer_tokens": 2,
    },
}


class Rollouts(BaseNode):
    """Item i: two groups, with answer i, of completions ``i`` (i tokens) and ``0`` (1 token)."""

    def reset(self, initial_state=None):
        super().reset(initial_state)
        self.i = initial_state["i"] if initial_state else 0

    def get_state(self):
        return {"i": self.i}

    def next(self):
        if self.i == 5:
            raise StopIteration
        i, self.i = self.i, self.i + 1
        groups = [
            Group(
                k,
                Prompt(f"p:{i}", "?", [1], answer=str(answer)),
                [completion(i, max(i, 1)), completion(0, 1)],
            )
            for k, answer in enumerate((i, 99))
        ]
        return GroupBatch(groups, stats={"length/mean": Mean(4.0, 2)})


def completion(text, num_tokens):
    return Completion([7] * num_tokens, [0.0] * num_tokens, str(text), "stop", 1.0)


@pytest.fixture(scope="module")
def pool():
    pool = RewardPool(REWARDS, num_workers=1)
    yield pool
    pool.close()


def test_score_fills_rewards(pool):
    node = Score(Rollouts(), pool)
    rollout = [next(node) for _ in range(4)][3]  # 3 tokens are half way down the slope
    scored = [(c.rewards, c.reward) for group in rollout.groups for c in group.completions]
    assert scored == [
        ({"correct": 1.0, "length": -0.5}, 0.75),
        ({"correct": 0.0, "length": 0.0}, 0.0),
        ({"correct": 0.0, "length": -0.5}, -0.25),
        ({"correct": 0.0, "length": 0.0}, 0.0),
    ]


def test_score_adds_sums_and_weights(pool):
    node = Score(Rollouts(), pool)
    rollouts = [next(node) for _ in range(4)]
    seconds = rollouts[3].stats.pop("time/score")
    assert isinstance(seconds, Time) and seconds.value > 0
    assert rollouts[3].stats == {
        "length/mean": Mean(4.0, 2),
        "reward/mean": Mean(0.5, 4),
        "_reward_sq": Mean(0.75**2 + 0.25**2, 4),
        "reward/correct": Mean(1.0, 4),
        "reward/length": Mean(-1.0, 4),
        "solved": Mean(0, 2),
        "rewarded/truncated": Mean(0, 1),
        "rewarded/repeats_prompt": Mean(0, 1),
        "rewarded/same_text": Mean(0, 1),
        "reward_failures": Sum(0),
    }
    solved = [rollout.stats["solved"] for rollout in rollouts]
    assert solved == [Mean(1, 2), Mean(1, 2), Mean(1, 2), Mean(0, 2)]


def rewarded(text, reward=1.0, finish_reason="stop"):
    return Completion([7], [0.0], text, finish_reason, 1.0, reward=reward)


def group_of(number, prompt, *completions):
    return Group(number, Prompt(f"p:{number}", prompt, [1]), list(completions))


def test_rewarded_stats_count_what_may_be_paid_for_nothing():
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    groups = [
        group_of(
            0,
            template.format("58 + 17"),
            rewarded("58 + 17", finish_reason="length"),
            rewarded("it is 75", finish_reason="length"),
            rewarded("yes"),
            rewarded("58 + 17", reward=0.0, finish_reason="length"),
            rewarded("58 + 17", reward=-1.0),
        ),
        group_of(
            1,
            template.format("30 + 41"),
            rewarded("yes", reward=0.1),
            rewarded("yes"),
            rewarded("<think>30 + 41</think> 71"),
            rewarded("71"),
            rewarded("71"),
            rewarded("71"),
            rewarded("71"),
        ),
    ]
    assert rewarded_stats(groups) == {
        "rewarded/truncated": Mean(2, 10),
        "rewarded/repeats_prompt": Mean(1, 10),
        "rewarded/same_text": Mean(3, 10),  # "yes", of two prompts; "71" is of one
    }


def test_rewarded_stats_of_no_reward_count_nothing():
    nothing = rewarded_stats([group_of(0, "58 + 17", rewarded("58 + 17", reward=0.0))])
    assert set(nothing.values()) == {Mean(0, 0)}


def test_score_counts_failures():
    pool = RewardPool({"r": {"function": "tests.rewards.sample_rewards.by_command"}}, num_workers=1)
    rollout = next(Score(Rollouts(), pool))  # the completions "0" are no commands
    pool.close()
    assert rollout.stats["reward_failures"] == Sum(4)
    assert rollout.stats["reward/mean"] == Mean(0.0, 4)


def test_failed_penalty_does_not_solve():
    """A penalty counts as 0 where its call fails, which is the most that it gives."""
    rewards = {
        "right": {"function": "gspo.rewards.exact_match"},
        "penalty": {"function": "tests.rewards.sample_rewards.fails_on_a_zero"},
    }
    pool = RewardPool(rewards, num_workers=1, max_failure_share=1)
    rollouts = list(Score(Rollouts(), pool))
    pool.close()
    solved = [rollout.stats["solved"] for rollout in rollouts[:2]]
    assert solved == [Mean(0, 2), Mean(1, 2)]


def test_score_resumes_anywhere(pool):
    def text_and_reward(rollout):
        return [(g.prompt.id, c.text, c.reward) for g in rollout.groups for c in g.completions]

    assert_resumes_anywhere(lambda: Score(Rollouts(), pool), 5, key=text_and_reward)
