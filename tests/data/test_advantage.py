import logging

import pytest
import torch

from gspo.data.advantage import Advantage
from gspo.errors import InputError
from gspo.metrics import Mean, Sum
from tests.data.fakes import Items, completion, exact, rollout
from tests.data.law import assert_resumes_anywhere

NAN, INF = float("nan"), float("inf")


def run(*groups, estimator="group_mean", seen=None, **options):
    """These groups through the node; a group is a list of completions or of rewards."""
    groups = [[c if hasattr(c, "reward") else completion(3, c) for c in group] for group in groups]
    node = Advantage(
        Items(lambda _: rollout(*groups), 1),
        estimator=estimator,
        on_quarantine=(seen if seen is not None else []).append,
        **options,
    )
    return next(node)


def advantages(result):
    return [[c.advantage for c in group.completions] for group in result.groups]


def test_advantage_is_taken_over_each_group_alone():
    assert advantages(run([0.0, 1.0], [4.0, 8.0])) == [[-0.5, 0.5], [-2.0, 2.0]]


def test_advantage_uses_the_estimator_given():
    assert advantages(run([0.0, 1.0], estimator="leave_one_out")) == [[-1.0, 1.0]]
    assert advantages(run([0.0, 1.0], estimator=lambda rewards: [10 * r for r in rewards])) == [
        [0.0, 10.0]
    ]


def test_dead_groups_are_dropped_and_stay_in_the_denominators():
    result = run([1.0, 1.0, 1.0], [0.0, 1.0])
    assert [g.id for g in result.groups] == [1]
    assert (result.dropped_documents, result.dropped_tokens) == (3, 9)
    assert result.stats["dead_groups"] == Mean(1, 2)


def test_refilled_dead_groups_do_not_count():
    result = run([1.0, 1.0, 1.0], [0.0, 1.0], refill_dead_groups=True)
    assert [g.id for g in result.groups] == [1]
    assert (result.dropped_documents, result.dropped_tokens) == (0, 0)
    assert result.stats["dead_groups"] == Mean(1, 2)


def test_kept_dead_groups_have_zero_advantage():
    result = run([0.1, 0.1, 0.1], [0.0, 1.0], drop_dead_groups=False, estimator="group_mean_std")
    assert advantages(result)[0] == [0.0, 0.0, 0.0]
    assert result.dropped_documents == 0 and result.stats["dead_groups"] == Mean(1, 2)


def test_a_rounding_residue_is_not_a_dead_group():
    assert run([0.1 + 0.2, 0.3]).stats["dead_groups"] == Mean(0, 1)


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (completion(3, NAN), "reward"),
        (completion(3, -INF), "reward"),
        (completion(3, 1e39), "reward"),  # infinite in the batch's float32
        (completion(3, logps=[-1.0, -INF, -1.0]), "logps"),
        (completion(3, logps=[NAN, -1.0, -1.0]), "logps"),
        (completion(3, logps=[INF, -INF, -1.0]), "logps"),
    ],
    ids=["nan_reward", "inf_reward", "too_large_reward", "inf_logp", "nan_logp", "both_infinities"],
)
def test_quarantine_leaves_every_count_and_the_group_baseline(bad, cause):
    seen = []
    result = run([0.0, bad, 1.0], [2.0, 4.0], seen=seen)
    assert advantages(result) == [[-0.5, 0.5], [-1.0, 1.0]]
    assert (result.dropped_documents, result.dropped_tokens) == (0, 0)
    assert result.stats["quarantined_documents"] == Sum(1)
    assert [(r["prompt_id"], r["group_id"], r["cause"]) for r in seen] == [("p:0", 0, cause)]
    assert seen[0]["tokens"] == bad.tokens and seen[0]["logps"] is bad.logps


def test_quarantine_of_an_advantage_that_is_not_finite():
    seen = []
    result = run([0.0, 1.0], estimator=lambda rewards: [NAN, 2.0], seen=seen)
    assert advantages(result) == [[2.0]] and seen[0]["cause"] == "advantage"
    assert result.stats["quarantined_documents"] == Sum(1)


@pytest.mark.parametrize(
    "nonsense", [None, 5, [1.0], ["a", "b"], [[1.0], [2.0]], [10**400, 1.0]], ids=repr
)
def test_an_estimator_that_gives_no_advantages_is_named(nonsense):
    def mine(rewards):
        return nonsense

    message = "^advantages.estimator: '.*mine' must give 2 numbers for as many rewards, and gave "
    with pytest.raises(InputError, match=message):
        run([0.0, 1.0], estimator=mine)


def test_an_estimator_may_give_a_tensor():
    assert advantages(run([0.0, 1.0], estimator=torch.tensor)) == [[0.0, 1.0]]


def test_a_completion_that_quarantine_leaves_alone_is_a_dead_group():
    result = run([NAN, 1.0], [NAN, NAN], [0.0, 1.0])
    assert [g.id for g in result.groups] == [2]
    assert (result.dropped_documents, result.dropped_tokens) == (1, 3)
    assert result.stats["dead_groups"] == Mean(1, 3)
    assert result.stats["quarantined_documents"] == Sum(3)
    kept = run([NAN, 1.0], drop_dead_groups=False, estimator="group_mean_std")
    assert advantages(kept) == [[0.0]]


def test_completions_without_tokens_count_in_the_baseline_and_as_dropped_documents():
    result = run([completion(0, 0.0), completion(3, 1.0)], [completion(0, 0.0), completion(0, 2.0)])
    assert advantages(result) == [[0.5]]
    assert (result.dropped_documents, result.dropped_tokens) == (3, 0)
    assert result.stats["quarantined_documents"] == Sum(0)


def test_quarantine_is_logged_by_default(caplog):
    node = Advantage(Items(lambda _: rollout([completion(3, NAN), completion(3, 1.0)]), 1))
    with caplog.at_level(logging.WARNING, logger="gspo.data.advantage"):
        next(node)
    assert (
        "quarantined a completion of prompt p:0 (group 0): reward is not finite; reward nan"
        in caplog.text
    )


def test_earlier_counts_and_stats_are_kept():
    node = Advantage(
        Items(
            lambda _: rollout(
                [completion(3)] * 2, stats={"x": Mean(1, 2)}, dropped_documents=5, dropped_tokens=7
            ),
            1,
        )
    )
    result = next(node)
    assert (result.dropped_documents, result.dropped_tokens) == (7, 13)
    assert result.stats["x"] == Mean(1, 2)


def test_advantage_refuses_groups_of_one_and_a_refill_without_a_drop():
    with pytest.raises(InputError, match="group_size: 1 "):
        run([1.0], estimator="group_mean_std")
    with pytest.raises(
        InputError, match="^refill_dead_groups: True needs drop_dead_groups: true; kept"
    ):
        run([1.0, 1.0], drop_dead_groups=False, refill_dead_groups=True)
    assert advantages(run([1.0], estimator=list, drop_dead_groups=False)) == [[1.0]]


def test_advantage_resumes_anywhere():
    def make():
        return Advantage(
            Items(
                lambda i: rollout([completion(3, i), completion(2, 2)], [completion(1, 0)] * 2), 4
            )
        )

    assert_resumes_anywhere(make, 4, key=exact)


def test_quarantined_completions_are_counted_apart_from_dropped_ones():
    result = run([0.0, NAN, 1.0], [1.0, 1.0])
    assert (result.quarantined_documents, result.dropped_documents) == (1, 2)
    assert result.lost_to == ""


def test_a_rollout_that_is_lost_says_to_which_cause_most_often():
    mute = completion(3, logps=[-1.0, NAN, -1.0])
    result = run([mute, mute, NAN], [NAN, mute], refill_dead_groups=True)
    assert (result.quarantined_documents, result.lost_to) == (5, "logps")
    dead = run([mute, mute], [1.0, 1.0], refill_dead_groups=True)
    assert (dead.quarantined_documents, dead.lost_to) == (2, "")
    infinite = run([0.0, 1.0], estimator=lambda rewards: [INF, -INF])
    assert infinite.lost_to == "advantage"
