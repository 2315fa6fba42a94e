import json

import pytest

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
def test_record_appends_the_first_completions_of_each_rollout(tmp_path, limit, texts):
    path = tmp_path / "new" / "completions.jsonl"
    passed = list(Record(Items(make, 2), path, num_per_rollout=limit))
    assert [exact(r) for r in passed] == [exact(make(i)) for i in range(2)]
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert (
        len(lines) if isinstance(texts, int) else [line["completion"] for line in lines]
    ) == texts


def test_record_says_what_was_asked_and_earned(tmp_path):
    group = [
        completion(
            2, reward=0.5, text="four", rewards={"odd": 0.5}, advantage=1.5, policy_version=7
        )
    ]
    path = tmp_path / "completions.jsonl"
    list(Record(Items(lambda _: rollout(group, []), 1), path, num_per_rollout=4))
    (line,) = path.read_text().splitlines()  # a group without completions has no line
    assert json.loads(line) == {
        "prompt_id": "p:0",
        "prompt": "prompt 0",
        "completion": "four",
        "answer": "0",
        "reward": 0.5,
        "rewards": {"odd": 0.5},
        "advantage": 1.5,
        "finish_reason": "stop",
        "policy_version": 7,
    }


def test_record_resumes_anywhere(tmp_path):
    path = tmp_path / "completions.jsonl"
    assert_resumes_anywhere(lambda: Record(Items(make, 4), path, num_per_rollout=1), 4, key=exact)
