"""Completions that must earn 0 and completions that must earn 1, in two tables.

A row's ``completion`` of a reasoning-gym task takes the fields of the task's entry in braces.
"""

import functools
from pathlib import Path

import pytest
import reasoning_gym as gym
import yaml

from gspo import rewards

DEFAULTS = {
    "reward": "math_verify",
    "options": {},
    "prompt": "What is 58 + 17?",
    "reference": "75",
    "finish_reason": "stop",
    "task": None,
}


def rows(name):
    path = Path(__file__).with_name(f"{name}.yaml")
    for number, row in enumerate(yaml.safe_load(path.read_text()), start=1):
        assert row.keys() <= DEFAULTS.keys() | {"why", "completion"}, row
        full = DEFAULTS | row
        yield pytest.param(full, id=f"{number}-{full['reward']}-{full['why']}")


@functools.cache
def entry_of(task):
    """An entry whose verifier pays for the question where the rows say so."""
    dataset = gym.create_dataset(task, size=40, seed=1)
    if task == "game_of_life_halting":
        return next(entry for entry in dataset if entry["answer"] == "False")
    if task == "prime_factorization":
        return next(entry for entry in dataset if "×" in entry["answer"])
    if task == "polynomial_multiplication":  # some are multiplied out already
        asked = "polynomial_expr"
        return next(entry for entry in dataset if entry["answer"] != entry["metadata"][asked])
    return dataset[0]


def fill_in(completion, entry):
    fields = {**entry["metadata"], "question": entry["question"], "answer": entry["answer"]}
    fields["last_sentence"] = entry["question"].split(". ")[-1]
    fields["premise"] = fields.get("premises", [""])[0]
    for name, value in fields.items():
        completion = completion.replace("{" + name + "}", str(value))
    return completion


def earned(row):
    reward = getattr(rewards, row["reward"])
    reward.check_options(**row["options"])
    completion, prompt = row["completion"], row["prompt"]
    metadata = {"finish_reason": row["finish_reason"]}
    if row["task"]:
        entry = entry_of(row["task"])
        completion, prompt = fill_in(completion, entry), entry["question"]
        metadata["entry"] = entry
    return reward(prompt, completion, row["reference"], metadata, **row["options"])


@pytest.mark.parametrize("row", list(rows("earned")))
def test_right_completion_earns_1(row):
    assert earned(row) == 1.0


@pytest.mark.parametrize("row", list(rows("not_earned")))
def test_wrong_completion_earns_nothing(row):
    assert earned(row) == 0.0


def test_the_tables_are_large_and_have_no_row_twice():
    for name in ("earned", "not_earned"):
        tests = [row.values[0] for row in rows(name)]
        assert len(tests) >= 60
        texts = [tuple(str(row[key]) for key in sorted(row) if key != "why") for row in tests]
        assert len(set(texts)) == len(texts)
