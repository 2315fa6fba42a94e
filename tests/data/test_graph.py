import sys
import threading
import time
from dataclasses import replace

import pytest

from gspo.data.prefetch import prefetched
from gspo.errors import DataError, InputError
from gspo.losses.inputs import find_segments
from tests.data.compose import compose
from tests.data.fakes import PARAMS, FakeSampler, Items, exact
from tests.data.law import assert_resumes_anywhere


def test_graph_turns_prompts_into_microbatches():
    batches = list(compose())
    assert sum(b.num_documents for b in batches) == 40
    live = [i for b in batches for i in b.ids]
    assert {i for i, _ in live} <= {f"p:{k}" for k in range(10)} and 0 < len(live) < 40
    for batch in batches:
        odd = batch.label_counts[:-1] % 2 == 1
        assert ((batch.advantages[:-1] > 0) == odd).all()
    names = {
        "length/mean",
        "reward/mean",
        "dead_groups",
        "quarantined_documents",
        "packing_efficiency",
        "time/score",
    }
    assert names <= batches[0].stats.keys()


def cut(batches):
    """Those with documents; every one of them has segments."""
    found = [batch for batch in batches if batch.ids]
    assert found and all(batch.segment_index is not None for batch in found)
    return found


def test_graph_cuts_completions_into_segments():
    def in_threes(completion):
        if completion.advantage > 0:  # the others keep that of their document
            completion.segment_advantages = [
                float(i) for i in range((len(completion.tokens) + 2) // 3)
            ]
        return [i // 3 for i in range(len(completion.tokens))]

    for batch in cut(compose(splitter=in_threes)):
        owners = {}
        for d, count in enumerate(batch.label_counts.tolist()):
            index = batch.segment_index[batch.loss_mask & (batch.document_index == d)]
            first = int(index.min()) if count else 0
            assert (index - first).tolist() == [i // 3 for i in range(count)]
            given = batch.segment_advantages[index.unique()].tolist()
            own = count and batch.advantages[d] > 0
            assert given == (
                list(range(len(given))) if own else [batch.advantages[d].item()] * len(given)
            )
            owners |= dict.fromkeys(index.tolist(), d)
        numbered = batch.segment_index[batch.loss_mask]
        assert len(owners) == len(numbered.unique()) <= batch.segment_advantages.numel()
        assert (
            find_segments(
                batch.segment_index, batch.document_index, batch.loss_mask
            ).label_counts.max()
            <= 3
        )
    assert all(
        batch.segment_index is None and batch.segment_advantages is None for batch in compose()
    )


def test_documents_that_are_not_cut_are_segments():
    batches = compose(
        splitter=lambda c: [0, *[1] * (len(c.tokens) - 1)] if len(c.tokens) > 5 else []
    )
    for batch in cut(batches):
        segments = find_segments(batch.segment_index, batch.document_index, batch.loss_mask)
        wanted = sum(2 if count > 5 else 1 for count in batch.label_counts.tolist() if count)
        assert len(segments.label_counts) == wanted and batch.segment_advantages is None


def test_graph_refills_dead_groups_by_not_counting_them():
    batches = list(compose(refill_dead_groups=True))
    assert sum(b.num_documents for b in batches) == sum(len(b.ids) for b in batches) < 40


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("flush", [True, False], ids=["flush", "buffer"])
def test_graph_resumes_anywhere(prefetch, flush):
    changes = {"prefetch": prefetch, "flush_every_rollout": flush, "buffer_size": 16}
    num_batches = len(list(compose(**changes)))
    assert num_batches > 3
    assert_resumes_anywhere(lambda: compose(**changes), num_batches, key=exact)


@pytest.mark.parametrize("prefetch", [1, 4])
def test_prefetch_changes_nothing_but_when(prefetch):
    assert [exact(b) for b in compose(prefetch=prefetch)] == [exact(b) for b in compose()]


def test_without_prefetch_nothing_is_drawn_ahead():
    sampler = FakeSampler()
    node = compose(sampler=sampler, tokens_per_microbatch=4096)
    node.state_dict()
    for num_calls in (1, 2):
        next(node)
        assert len(sampler.calls) == num_calls


def test_prefetch_runs_as_far_ahead_as_it_says():
    sampler = FakeSampler()
    node = compose(num_prompts=30, sampler=sampler, tokens_per_microbatch=4096, prefetch=2)
    next(node)
    deadline = time.monotonic() + 10
    while len(sampler.calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(sampler.calls) == 3  # one taken, two waiting


def test_an_error_on_the_prefetch_thread_arrives_as_it_was_raised():
    def make(index):
        if index == 2:
            raise DataError("train.jsonl:2", must="not JSON")
        return {"index": index}

    node = prefetched(Items(make, 5), 2)
    assert [next(node), next(node)] == [{"index": 0}, {"index": 1}]
    with pytest.raises(DataError) as caught:
        next(node)
    assert str(caught.value) == "train.jsonl:2: not JSON"


def test_an_exit_on_the_prefetch_thread_is_one_of_the_run():
    node = prefetched(Items(lambda index: sys.exit(3), 5), 2)
    with pytest.raises(SystemExit) as caught:
        next(node)
    assert caught.value.code == 3


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_refused_completion_stops_the_graph(prefetch):
    node = compose(sampler=FakeSampler(top_k=3), prefetch=prefetch)
    with pytest.raises(InputError, match="^a completion of prompt p:0: top_k is 3, needed: 0"):
        next(node)


def test_ranks_draw_differently_from_equal_prompts():
    assert exact(next(compose(rank=0)).tokens) != exact(next(compose(rank=1)).tokens)


def test_record_stands_between_advantages_and_packing():
    rows = []
    list(compose(write=rows.extend))
    dead = [row["dead"] for row in rows]
    assert any(dead) and not all(dead)
    assert [row["advantage"] == 0.0 for row in rows] == dead


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size: 0 "),
        ({"estimator": "mean"}, "estimator: 'mean'"),
        ({"prefetch": -1}, "^num_items: -1"),
        ({"params": replace(PARAMS, temperature=0.0)}, "^temperature: 0.0 must be above 0"),
        ({"bin_length": 3}, "bin_length: 3 does not divide"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_nodes_refuse_arguments_before_any_thread_starts(changes, message):
    before = threading.active_count()
    with pytest.raises(InputError, match=message):
        compose(**({"prefetch": 1} | changes))
    assert threading.active_count() == before


@pytest.mark.parametrize("estimator", ["group_mean_std", "leave_one_out"])
def test_graph_refuses_groups_of_one(estimator):
    with pytest.raises(InputError, match="group_size: 1 "):
        next(compose(group_size=1, estimator=estimator, prefetch=1))


def test_graph_refuses_a_prompt_that_no_bin_holds():
    with pytest.raises(
        InputError,
        match="prompt p:3: has 4 tokens, which with max_new_tokens 9 is more than the 12",
    ):
        list(compose(tokens_per_microbatch=11))
