import json

import pytest

from gspo.data.advantage import Advantage
from gspo.data.record import Record
from tests.data.fakes import Items, completion, exact, rollout
from tests.data.law import assert_resumes_anywhere


def make(index):
    groups = [
        [completion(2, reward=float(i), text=f"{index}.{i}"), completion(3)] for i in range(3)
    ]
    return rollout(*groups)


@pytest.mark.parametrize(
    ("limit", "texts"), [(0, []), (2, ["0.0", "0.1", "1.0", "1.1"]), (9, 6)], ids=str
)
def test_record_writes_the_first_completions_of_each_rollout(limit, texts):
    rows = []
    passed = list(Record(Items(make, 2), rows.extend, num_per_rollout=limit))
    assert [exact(r) for r in passed] == [exact(make(i)) for i in range(2)]
    found = [row["completion"] for row in rows]
    assert (len(found) if isinstance(texts, int) else found) == texts


def test_record_says_what_was_asked_and_earned():
    group = [
        completion(
            2, reward=0.5, text="four", rewards={"odd": 0.5}, advantage=1.5, policy_version=7
        )
    ]
    rows = []
    list(Record(Items(lambda _: rollout(group, []), 1), rows.extend, num_per_rollout=4))
    (row,) = rows  # a group without completions has none
    assert json.loads(json.dumps(row)) == {
        "prompt_id": "p:0",
        "prompt": "prompt 0",
        "completion": "four",
        "answer": "0",
        "reward": 0.5,
        "rewards": {"odd": 0.5},
        "advantage": 1.5,
        "dead": False,
        "finish_reason": "stop",
        "policy_version": 7,
    }


@pytest.mark.parametrize("dropped", [True, False], ids=["dropped", "kept"])
def test_record_writes_dead_groups_in_the_order_of_the_draws(dropped):
    def make(_):
        rewards = [(1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.0, 1.0)]
        return rollout(*[[completion(reward=reward) for reward in pair] for pair in rewards])

    rows = []
    node = Advantage(Items(make, 1), estimator="group_mean", drop_dead_groups=dropped)
    (passed,) = Record(node, rows.extend, num_per_rollout=3)
    assert [row["prompt_id"] for row in rows] == ["p:0", "p:1", "p:2"]
    assert [row["dead"] for row in rows] == [True, False, True]
    assert [row["advantage"] for row in rows] == [0.0, 0.5, 0.0]
    assert len(passed.groups) == (2 if dropped else 4)


def test_record_resumes_anywhere():
    rows = []
    assert_resumes_anywhere(
        lambda: Record(Items(make, 4), rows.extend, num_per_rollout=1), 4, key=exact
    )
