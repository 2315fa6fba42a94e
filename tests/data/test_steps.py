import logging

import pytest
import torch
import torch.distributed as dist

from gspo import parallel
from gspo.data.steps import FetchSteps
from gspo.errors import InputError
from tests.data.fakes import Items
from tests.distributed.launch import launch, once_per_world_size
from tests.distributed.steps import batch

CPU = torch.device("cpu")
WORLD_SIZES = [1, 2, 4]


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank of a world size computed, by real processes."""
    return once_per_world_size(tmp_path_factory, "tests.distributed.sums:everything")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_counts_add_up_over_ranks(found, world_size):
    for rank in found(world_size):
        assert rank["sum"] == [world_size, sum(range(world_size)), world_size * 2**40]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_mesh_gives_every_rank_its_own_data(found, world_size):
    for replicate in (1, 2):
        if world_size % replicate == 0:
            shapes = [rank["meshes"][replicate][:2] for rank in found(world_size)]
            shards = world_size // replicate
            flat = (shards,) if replicate == 1 else (replicate, shards)
            assert shapes == [((replicate, shards, 1), flat)] * world_size
            places = [rank["meshes"][replicate][2] for rank in found(world_size)]
            assert places == [(i, world_size) for i in range(world_size)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_replicas_must_divide_the_ranks(found, world_size):
    for rank in found(world_size):
        assert rank["meshes"][3] == (
            "data_parallel_replicate_size: 3 x context_parallel_size 1 = 3, which does not divide "
            f"the {world_size} ranks of this run; change one of them, or start a multiple of 3 "
            "ranks with `tune run --nproc_per_node`"
        )


def test_every_group_of_the_meshes_waits_as_long_as_told(tmp_path):
    """With torch alone, groups of a part of the ranks would wait for ten minutes, or for thirty."""
    for rank in launch("tests.distributed.sums:timeouts", 4, tmp_path, 1234.0):
        assert rank == {"replicate": 1234.0, "shard": 1234.0, "context": 1234.0}


def test_a_rank_that_does_not_come_is_named_as_the_cause(tmp_path):
    said, _ = launch("tests.distributed.sums:wait_in_vain", 2, tmp_path)
    assert said.startswith(
        "collective_timeout: has passed while rank 0 waited for another rank's microbatch"
    )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_metrics_are_the_same_on_every_rank_however_they_are_spread(found, world_size):
    expected = {
        "loss": -0.25,
        "ratio/mean": 1.0,
        "ratio/max": 2.5,
        "ratio/min": 0.25,
        "tokens": 17.0,
        "reward/a": 0.6,
    }
    for rank in found(world_size):
        metrics = dict(rank["metrics"])
        # Seconds add up on a rank; the step takes as long as its slowest one.
        assert metrics.pop("time/sample") == {1: 5.0, 2: 3.0, 4: 3.0}[world_size]
        assert metrics == pytest.approx(expected)


def test_one_process_makes_a_group_without_a_port(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    parallel.init_process_group(CPU)
    try:
        assert dist.get_world_size() == 1 and parallel.sum_over_ranks([3]) == [3]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("docs_per_step", "num_warnings"), [(5, 1), (6, 0)])
def test_overshoot_by_more_than_half_is_logged_once(
    one_process, caplog, docs_per_step, num_warnings
):
    source = Items(lambda _: batch(9, dropped=2), 6)
    steps = FetchSteps(source, docs_per_step=docs_per_step)
    with caplog.at_level(logging.WARNING, logger="gspo.data.steps"):
        assert [step.num_documents for step in steps] == [9] * 6
    assert [record.getMessage() for record in caplog.records] == [
        "docs_per_step: 5, but a step took 9 documents, dropped ones included: it takes whole "
        "microbatches, one or more of every rank. Lower packing.tokens_per_microbatch, or raise "
        "docs_per_step."
    ] * num_warnings


def quarantined(num_documents, num_quarantined, lost_to=""):
    made = batch(num_documents, dropped=0)
    made.num_quarantined, made.lost_to = num_quarantined, lost_to
    return made


def test_quarantined_documents_count_as_drawn_and_in_no_denominator(one_process):
    steps = FetchSteps(Items(lambda _: quarantined(5, 3), 4), docs_per_step=16)
    assert [(len(step.batches), step.num_documents) for step in steps] == [(2, 10), (2, 10)]


def test_a_step_has_a_document(one_process):
    source = Items(lambda i: quarantined(0 if i < 3 else 5, 8), 4)
    steps = FetchSteps(source, docs_per_step=8)
    assert [(len(step.batches), step.num_documents) for step in steps] == [(4, 5)]


def test_microbatches_without_a_document_have_the_shape_of_the_others(one_process):
    steps = FetchSteps(Items(lambda _: None, 0), docs_per_step=8, empty_shape=(2, 64))
    steps.reset()
    empty = steps._draw().batch  # of a rank whose prompts have ended before those of others
    assert (empty.num_bins, empty.bin_length, empty.num_documents) == (2, 64, 0)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("reward", "rewards: gave no number that float32 holds: all 7 completions"),
        ("logps", "sampler: gave log-probabilities that are not finite: all 7 completions"),
        ("advantage", "advantages.estimator: gave no advantage that float32 holds: all 7"),
    ],
)
def test_a_rollout_that_is_lost_ends_the_run(one_process, cause, message):
    source = Items(lambda i: quarantined(0, 7, cause) if i else quarantined(5, 1), 3)
    steps = FetchSteps(source, docs_per_step=6)
    assert next(steps).num_documents == 5
    with pytest.raises(InputError) as refused:
        next(steps)
    assert str(refused.value).startswith(message)
    assert "quarantine_rank<r>.jsonl in output_dir" in str(refused.value)
