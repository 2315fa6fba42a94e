import threading
import time
from dataclasses import replace

import pytest

from gspo.data.graph import GraphOptions, build_graph
from gspo.data.prefetch import prefetched
from gspo.data.record import Record
from gspo.errors import InputError
from gspo.losses.inputs import find_segments
from tests.data.fakes import PARAMS, FakePool, FakeSampler, Items, exact, prompt
from tests.data.law import assert_resumes_anywhere

OPTIONS = GraphOptions(
    prompts_per_rollout=3, group_size=4, params=PARAMS, seed=5, tokens_per_microbatch=64
)


def graph(num_prompts=10, sampler=None, rank=0, record=None, splitter=None, **changes):
    return build_graph(
        Items(prompt, num_prompts),
        sampler=sampler or FakeSampler(),
        pool=FakePool(),
        options=replace(OPTIONS, **changes),
        rank=rank,
        record=record,
        splitter=splitter,
    )


def test_graph_turns_prompts_into_microbatches():
    batches = list(graph())
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

    for batch in cut(graph(splitter=in_threes)):
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
        batch.segment_index is None and batch.segment_advantages is None for batch in graph()
    )


def test_documents_that_are_not_cut_are_segments():
    batches = graph(splitter=lambda c: [0, *[1] * (len(c.tokens) - 1)] if len(c.tokens) > 5 else [])
    for batch in cut(batches):
        segments = find_segments(batch.segment_index, batch.document_index, batch.loss_mask)
        wanted = sum(2 if count > 5 else 1 for count in batch.label_counts.tolist() if count)
        assert len(segments.label_counts) == wanted and batch.segment_advantages is None


def test_graph_refills_dead_groups_by_not_counting_them():
    batches = list(graph(refill_dead_groups=True))
    assert sum(b.num_documents for b in batches) == sum(len(b.ids) for b in batches) < 40


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("flush", [True, False], ids=["flush", "buffer"])
def test_graph_resumes_anywhere(prefetch, flush):
    changes = {"prefetch": prefetch, "flush_every_rollout": flush, "buffer_size": 16}
    num_batches = len(list(graph(**changes)))
    assert num_batches > 3
    assert_resumes_anywhere(lambda: graph(**changes), num_batches, key=exact)


@pytest.mark.parametrize("prefetch", [1, 4])
def test_prefetch_changes_nothing_but_when(prefetch):
    assert [exact(b) for b in graph(prefetch=prefetch)] == [exact(b) for b in graph()]


def test_without_prefetch_nothing_is_drawn_ahead():
    sampler = FakeSampler()
    node = graph(sampler=sampler, tokens_per_microbatch=4096)
    node.state_dict()
    for num_calls in (1, 2):
        next(node)
        assert len(sampler.calls) == num_calls


def test_prefetch_runs_as_far_ahead_as_it_says():
    sampler = FakeSampler()
    node = graph(num_prompts=30, sampler=sampler, tokens_per_microbatch=4096, prefetch=2)
    next(node)
    deadline = time.monotonic() + 10
    while len(sampler.calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(sampler.calls) == 3  # one taken, two waiting


def test_an_error_on_the_prefetch_thread_arrives_as_it_was_raised():
    def make(index):
        if index == 2:
            raise InputError("line 2 is not JSON")
        return {"index": index}

    node = prefetched(Items(make, 5), 2)
    assert [next(node), next(node)] == [{"index": 0}, {"index": 1}]
    with pytest.raises(InputError) as caught:
        next(node)
    assert str(caught.value) == "line 2 is not JSON"


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_refused_completion_stops_the_graph(prefetch):
    node = graph(sampler=FakeSampler(top_k=3), prefetch=prefetch)
    with pytest.raises(InputError, match="^a completion of prompt p:0: top_k is 3, needed: 0"):
        next(node)


def test_ranks_draw_differently_from_equal_prompts():
    assert exact(next(graph(rank=0)).tokens) != exact(next(graph(rank=1)).tokens)


def test_record_stands_between_advantages_and_packing(tmp_path):
    list(graph(record=lambda node: Record(node, tmp_path / "completions.jsonl", num_per_rollout=1)))
    lines = (tmp_path / "completions.jsonl").read_text().splitlines()
    assert lines and all('"advantage": 0.0' not in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size: 1 "),
        ({"group_size": 1, "estimator": "leave_one_out"}, "group_size: 1 "),
        ({"estimator": "mean"}, "^advantages.estimator: 'mean'"),
        ({"prefetch": -1}, "prefetch: -1"),
        ({"params": replace(PARAMS, top_p=0.9)}, "^sampling.top_p is 0.9, needed: 1.0"),
        ({"bin_length": 3}, "bin_length: 3 does not divide"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_graph_refuses_options_before_any_thread_starts(changes, message):
    before = threading.active_count()
    with pytest.raises(InputError, match=message):
        graph(prefetch=1, **changes) if "prefetch" not in changes else graph(**changes)
    assert threading.active_count() == before


def test_graph_refuses_a_prompt_that_no_bin_holds():
    with pytest.raises(
        InputError, match="prompt p:3 has 4 tokens, which with max_new_tokens 9 is more than the 12"
    ):
        list(graph(tokens_per_microbatch=11))
