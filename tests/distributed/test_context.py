"""Context parallelism gives the same gradient as one rank, for any documents.

Its balance, memory and communication are tested too.
"""

import numpy as np
import pytest
import torch

from gspo.data.layout import pack_documents
from gspo.parallel.balance import assign_slots
from gspo.parallel.context import ContextAxis
from gspo.parallel.split import split
from tests import tiny_policy
from tests.distributed.context import LOSSES, MESHES
from tests.distributed.launch import once_per_world_size

NUM_CASES = 15  # six of gspo, six of grpo, three of segments
WAYS = [(world_size, name) for world_size, names in MESHES.items() for name in names]
CONTEXT_SIZE = {name: context for names in MESHES.values() for name, (_, context) in names.items()}
each_way = pytest.mark.parametrize(("world_size", "name"), WAYS, ids=[name for _, name in WAYS])
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 8  # of the tiny policy


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the ranks of a world size found, by real processes."""
    target = "tests.distributed.context:everything"
    return once_per_world_size(tmp_path_factory, target, lambda _: (NUM_CASES,))


@each_way
def test_gradient_of_random_documents_is_that_of_one_rank(found, world_size, name):
    for rank in found(world_size):
        for seed, (gradient_error, loss_error) in enumerate(rank["cases"][name]):
            assert gradient_error < 1e-5 and loss_error < 1e-5, seed


@each_way
@pytest.mark.parametrize("loss", LOSSES)
def test_three_optimizer_steps_later_it_still_is(found, world_size, name, loss):
    expected = found(1)[0]["steps"]["1x1", loss]
    for step, ((metrics, grads), (want, want_grads)) in enumerate(
        zip(found(world_size)[0]["steps"][name, loss], expected, strict=True)
    ):
        bound = 1e-4 if step else 1e-5
        assert metrics.keys() == want.keys()
        for key, value in want.items():
            assert metrics[key] == pytest.approx(value, rel=bound, abs=1e-7, nan_ok=True), (
                step,
                key,
            )
        for parameter, grad in want_grads.items():
            error = np.linalg.norm(grads[parameter] - grad) / np.linalg.norm(grad)
            assert error < bound, (step, parameter)


@each_way
def test_only_one_key_and_value_per_token_and_layer_travels(found, world_size, name):
    cost = found(world_size)[0]["cost"][name]
    gathered = 2 * cost["slots"] * KV_HEADS * HEAD_DIM * LAYERS
    assert cost["collectives"] == (
        {"all_gather_into_tensor": gathered} if CONTEXT_SIZE[name] > 1 else {}
    )


@each_way
def test_activations_are_split(found, world_size, name):
    """Only hidden states are split: attention keeps all keys and values.

    With checkpointing it does not keep even these.
    """
    whole, cost, size = (
        found(1)[0]["cost"]["1x1"],
        found(world_size)[0]["cost"][name],
        CONTEXT_SIZE[name],
    )
    assert cost["kept"] == whole["kept"] // size
    assert cost["checkpointed"] == whole["checkpointed"] // size
    assert cost["checkpointed"] < cost["kept"] / 3


@each_way
def test_one_rank_draws_for_its_context_group(found, world_size, name):
    groups = {}
    for rank in found(world_size):
        shared = rank["shared"][name]
        groups.setdefault(shared["data_rank"], []).append(shared["tokens"])
        assert (
            len(shared["tokens"]) == 3
            and shared["rest"] == shared["resumed"] == shared["tokens"][1:]
        )
        assert shared["collected"]
    assert len(groups) == world_size // CONTEXT_SIZE[name]
    for tokens in groups.values():
        assert len(tokens) == CONTEXT_SIZE[name] and all(t == tokens[0] for t in tokens)
    assert len({str(tokens[0]) for tokens in groups.values()}) == len(groups)


def log_normal_batch(seed, *, bin_length=8192, num_bins=2, median=400, longest=4096):
    """Bins of documents whose lengths are log-normal."""
    rng = np.random.default_rng(seed)
    positions = np.zeros((num_bins, bin_length), dtype=np.int64)
    for row in positions:
        start = 0
        while start < bin_length:
            length = min(
                int(np.clip(median * np.exp(rng.normal()), 16, longest)), bin_length - start
            )
            row[start : start + length] = np.arange(length)
            start += length
    return positions


def blocks_of_keys(positions, queries, keys, block=128):
    """Counts pairs of a block of queries and a block of keys.

    A pair counts if the mask lets anything in it through.
    """
    document = np.cumsum(positions == 0)
    count = 0
    for q in queries.reshape(-1, block):
        seen = (document[q][:, None] == document[keys]) & (q[:, None] >= keys)
        count += int(seen.reshape(block, -1, block).any((0, 2)).sum())
    return count


@pytest.mark.parametrize("size", [2, 4, 8])
def test_attention_work_is_balanced_on_log_normal_lengths(size):
    for seed in range(3):
        positions = log_normal_batch(seed)
        slots = assign_slots(positions + 1, size)
        assert (
            np.sort(slots.transpose(1, 0, 2).reshape(len(positions), -1)) == np.arange(8192)
        ).all()
        assert (np.diff(slots) > 0).all()
        work = np.zeros(size)
        for row, mine in zip(positions, slots.transpose(1, 0, 2), strict=True):
            work += [blocks_of_keys(row, queries, mine.reshape(-1)) for queries in mine]
        assert work.max() < 1.03 * work.mean(), work
        in_order = sum(blocks_of_keys(row, np.arange(8192), np.arange(8192)) for row in positions)
        assert work.sum() == in_order  # a block mask skips as much as on one rank


def test_places_of_short_bins_are_dealt_one_by_one():
    num_keys = np.tile(np.arange(12) + 1, (5, 1))
    for mine in assign_slots(num_keys, 2):
        assert np.take_along_axis(num_keys, mine, 1).sum(1).tolist() == [39] * 5


@pytest.mark.parametrize("length", [1, 3, 8, 46])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_bins_of_any_length_are_split(length, size):
    documents = [d for d in tiny_policy.documents() if d.num_slots <= length]
    batch = pack_documents(documents, length)
    parts = [split(batch, ContextAxis(None, rank, size)) for rank in range(size)]
    for part in parts:
        assert (
            part.part.tokens.numel() * size
            == part.whole.tokens.numel()
            < batch.tokens.numel() + batch.num_bins * size
        )
    assert torch.cat([p.part.loss_mask for p in parts]).sum() == batch.loss_mask.sum()
    labels = torch.cat([p.part.labels[p.part.loss_mask] for p in parts])
    assert labels.sort()[0].tolist() == batch.labels[batch.loss_mask].sort()[0].tolist()
    assert torch.stack([p.counted for p in parts]).sum(0).eq(1).all()


def test_padding_added_for_the_split_belongs_to_the_padding_document():
    batch = pack_documents(tiny_policy.documents(5), 46)
    whole = split(batch, ContextAxis(None, 0, 4)).whole
    added = whole.document_index.view(batch.num_bins, 48)[:, 46:]
    assert added.eq(batch.label_counts.numel() - 1).all()
