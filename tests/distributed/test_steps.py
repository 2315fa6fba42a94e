"""``docs_per_step`` decides which microbatches make a step.

It also decides the totals that every microbatch is divided by.
"""

from itertools import zip_longest

import pytest

from tests.distributed.launch import launch, once_per_world_size
from tests.distributed.steps import LIVE, ROLLOUT_SIZE, SOURCES

DOCS_PER_STEP = 10
WORLD_SIZES = [1, 2, 4]
PARTS_OF_ROLLOUT = {"part_of_rollout": 0.3, "rollout": 1, "rollouts": 2.5}


def docs_of(part, world_size):
    return round(part * ROLLOUT_SIZE * world_size)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """What each rank of a world size drew, by real processes."""
    return once_per_world_size(
        tmp_path_factory,
        "tests.distributed.steps:everything",
        lambda world_size: (
            DOCS_PER_STEP,
            [docs_of(part, world_size) for part in PARTS_OF_ROLLOUT.values()],
        ),
    )


def expected_steps(counts):
    """Rounds of one microbatch a rank, added to a step until it holds enough documents."""
    rounds = [list(r) for r in zip_longest(*counts, fillvalue=0)]
    steps, current = [], []
    for one in rounds:
        current.append(one)
        if sum(map(sum, current)) >= DOCS_PER_STEP:
            steps.append(current)
            current = []
    return steps + ([current] if sum(map(sum, current)) else [])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", SOURCES)
def test_step_takes_rounds_until_it_holds_enough_documents(drawn, world_size, name):
    found = [rank["sources"][name] for rank in drawn(world_size)]
    expected = expected_steps(SOURCES[name][:world_size])
    for rank, steps in enumerate(found):
        assert [[documents for documents, _ in step["mine"]] for step in steps] == [
            [one[rank] for one in step] for step in expected
        ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", SOURCES)
def test_every_rank_is_told_the_totals_of_the_step(drawn, world_size, name):
    for of_ranks in zip(*(rank["sources"][name] for rank in drawn(world_size)), strict=True):
        documents, tokens = (
            sum(pair[i] for step in of_ranks for pair in step["mine"]) for i in (0, 1)
        )
        assert {(s["num_documents"], s["num_label_tokens"]) for s in of_ranks} == {
            (documents, tokens)
        }


def test_steps_overshoot_and_stay_short_where_the_cases_say(drawn):
    of_four, of_one = drawn(4)[0]["sources"], drawn(1)[0]["sources"]
    assert (
        of_four["ragged"][0]["num_documents"] > DOCS_PER_STEP
    )  # a round brings more than is missing
    assert (
        of_one["ends_first"][-1]["num_documents"] < DOCS_PER_STEP
    )  # what was left when the source ended
    assert of_four["nothing"] == []


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("part", PARTS_OF_ROLLOUT.values(), ids=PARTS_OF_ROLLOUT.keys())
def test_ranks_draw_their_next_rollouts_in_the_same_round(drawn, world_size, part):
    found = [rank["rollouts"][docs_of(part, world_size)]["drawn"] for rank in drawn(world_size)]
    longest = max(found, key=len)
    # A rollout of n live documents takes ceil(n / 3) microbatches, and at least one.
    # The next rollout begins where all ranks are through.
    rounds = [
        max(max(-(-n // 3), 1) for n in of_ranks)
        for of_ranks in zip_longest(*LIVE[:world_size], fillvalue=0)
    ]
    assert longest == [sum(rounds[:i]) for i in range(len(rounds))]
    assert found == [longest[: len(live)] for live in LIVE[:world_size]]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_steps_of_one_rollout_train_on_nothing_stale(drawn, world_size):
    common = min(map(len, LIVE[:world_size]))
    for rank in drawn(world_size):
        staleness = rank["rollouts"][docs_of(1, world_size)]["staleness"]
        assert len(staleness) >= common and set().union(*staleness[:common]) == {0}


def test_steps_resume_anywhere_on_ranks_that_wait(tmp_path):
    launch(
        "tests.distributed.steps:resume_anywhere",
        2,
        tmp_path,
        docs_of(PARTS_OF_ROLLOUT["part_of_rollout"], 2),
    )
