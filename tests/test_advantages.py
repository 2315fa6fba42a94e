import re

import pytest
import torch

from gspo.advantages import (
    ESTIMATORS,
    all_equal,
    check_group_size,
    get_estimator,
    group_mean,
    group_mean_std,
    leave_one_out,
)
from gspo.errors import InputError

ALL = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (group_mean_std, [-0.5, -0.5, -0.5, 1.5]),  # squares of the deviations 12, over 3: std 2
        (group_mean, [-1.0, -1.0, -1.0, 3.0]),
        (leave_one_out, [-4 / 3, -4 / 3, -4 / 3, 4.0]),
    ],
    ids=["group_mean_std", "group_mean", "leave_one_out"],
)
def test_estimator_matches_values_by_hand(estimator, expected):
    assert estimator([0.0, 0.0, 0.0, 4.0]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [2, 3, 63, 257])
def test_estimators_match_torch(size):
    rewards = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    others = (rewards.sum() - rewards) / (size - 1)
    deviations = rewards - rewards.mean()
    torch.testing.assert_close(torch.tensor(group_mean(rewards), dtype=torch.float64), deviations)
    torch.testing.assert_close(
        torch.tensor(group_mean_std(rewards), dtype=torch.float64), deviations / rewards.std()
    )
    torch.testing.assert_close(
        torch.tensor(leave_one_out(rewards), dtype=torch.float64), rewards - others
    )


@ALL
@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_equal_rewards_give_exact_zeros(estimator, size):
    assert estimator([0.1] * size) == [0.0] * size


def test_std_floor_keeps_rounding_residue_small():
    residue = [0.1 + 0.2, 0.3, 0.3, 0.3]
    assert residue[0] != residue[1]
    assert max(map(abs, group_mean_std(residue))) < 1e-11
    assert max(map(abs, group_mean_std(residue, std_floor=0.0))) > 0.5  # what the floor is for


def test_std_above_the_floor_is_not_changed_by_it():
    assert group_mean_std([0.0, 1.0], std_floor=0.7) == group_mean_std([0.0, 1.0], std_floor=0.0)


@ALL
def test_a_group_of_one_is_refused(estimator):
    with pytest.raises(InputError, match="group_size: 1 "):
        estimator([1.0])
    with pytest.raises(InputError, match="group_size: 1 "):
        check_group_size(estimator, 1)
    check_group_size(estimator, 2)


def test_a_group_of_one_is_a_callables_own_affair():
    check_group_size(lambda rewards: rewards, 1)


def test_all_equal_is_exact():
    assert all_equal([0.1, 0.1]) and all_equal([0.1]) and all_equal([])
    assert not all_equal([0.1 + 0.2, 0.3])


def test_get_estimator_names_what_there_is():
    assert get_estimator("group_mean") is group_mean
    assert get_estimator(max) is max
    for unknown in ("mean", ["group_mean"]):
        names = "group_mean_std, group_mean, leave_one_out"
        remedy = f"use one of {names}, or the dotted path of a function"
        message = f"estimator: {unknown!r} is not known; {remedy}"
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            get_estimator(unknown)


def test_estimator_by_its_dotted_path():
    assert get_estimator("gspo.advantages.group_mean") is group_mean


def test_dotted_path_to_no_function_is_refused():
    with pytest.raises(InputError, match="estimator: 'math.pi' is a float, not a function"):
        get_estimator("math.pi")
