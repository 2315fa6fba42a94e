"""``docs_per_step``: which microbatches make a step, and the totals that every one of them is divided by."""

from itertools import zip_longest

import pytest

from tests.distributed.launch import once_per_world_size
from tests.distributed.steps import SOURCES

DOCS_PER_STEP = 10
WORLD_SIZES = [1, 2, 4]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """What each rank of a world size drew, by real processes."""
    return once_per_world_size(tmp_path_factory, "tests.distributed.steps:draw_all", lambda _: (DOCS_PER_STEP,))


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
    found = [rank[name] for rank in drawn(world_size)]
    expected = expected_steps(SOURCES[name][:world_size])
    for rank, steps in enumerate(found):
        assert [[documents for documents, _ in step["mine"]] for step in steps] == [
            [one[rank] for one in step] for step in expected
        ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", SOURCES)
def test_every_rank_is_told_the_totals_of_the_step(drawn, world_size, name):
    for of_ranks in zip(*(rank[name] for rank in drawn(world_size)), strict=True):
        documents, tokens = (sum(pair[i] for step in of_ranks for pair in step["mine"]) for i in (0, 1))
        assert {(s["num_documents"], s["num_label_tokens"]) for s in of_ranks} == {(documents, tokens)}


def test_steps_overshoot_and_stay_short_where_the_cases_say(drawn):
    totals = [step["num_documents"] for step in drawn(4)[0]["ragged"]]
    assert totals[0] > DOCS_PER_STEP  # a round brings more than is missing
    assert drawn(1)[0]["ends_first"][-1]["num_documents"] < DOCS_PER_STEP  # what was left when the source ended
    assert drawn(4)[0]["nothing"] == []
