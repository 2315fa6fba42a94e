"""Objectives whose documents span ranks: whatever the split, values and metrics add up and gradients are the whole's.

The ranks are threads that meet where sums are completed; :mod:`tests.distributed.test_context` has real ones.
"""

import random
import threading
from dataclasses import replace

import pytest
import torch

from gspo.losses import GRPOLoss, GSPOLoss
from gspo.metrics import merge_pairs
from tests import objectives

OPTIONS = {
    "plain": {},
    "per_token": {"aggregation": "token"},
    "penalties": {"kl_coef": 0.1, "entropy_coef": 0.05},
}


class Axis:
    """Sums over threads, each of which gets the gradient of its own part."""

    def __init__(self, size):
        self.parts = [None] * size
        self.barrier = threading.Barrier(size, timeout=20)
        self.num_sums = 0

    def complete(self, rank):
        def sum_over_ranks(sums):
            self.parts[rank] = sums.detach()
            self.num_sums += rank == 0
            self.barrier.wait()
            total = sum(self.parts)
            self.barrier.wait()
            return sums + (total - sums.detach())

        return sum_over_ranks


def on_threads(function, size):
    """``function(rank)`` of every rank at once."""
    found = [None] * size
    errors = []

    def run(rank):
        try:
            found[rank] = function(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def random_case(seed):
    """Documents, spans of masks among them, and how many ranks share them."""
    rng = random.Random(seed)
    documents = objectives.random_documents([rng.randint(1, 40) for _ in range(rng.randint(1, 7))], seed=seed)
    for d in documents:
        start = rng.randrange(d["mask"].numel())
        d["mask"][start : start + rng.randint(0, 4)] = False
    if seed % 4 == 0:  # quarantined, by a token that one rank holds
        d = documents[0]
        d["mask"][-1] = True
        d["new"][-1] = torch.nan
    return documents, rng.choice([1, 2, 3, 4]), rng


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("build", [GSPOLoss, GRPOLoss])
def test_any_split_is_the_whole(build, options, seed):
    documents, size, rng = random_case(seed)
    loss = build(clip_low=0.2, clip_high=0.25, **options)
    new, entropy, inputs = objectives.pack(documents)
    if not options.get("kl_coef"):
        inputs = replace(inputs, ref_logps=None)
    places = list(range(new.numel()))
    rng.shuffle(places)
    rank_of = torch.tensor([rng.randrange(size) for _ in places])  # some ranks may hold nothing
    shares = [torch.tensor([p for p in places if rank_of[p] == rank], dtype=torch.int64) for rank in range(size)]
    axis = Axis(size)

    def run(rank):
        mine = shares[rank]
        logps = new[mine].clone().requires_grad_()
        entropies = entropy[mine].clone().requires_grad_()
        part = replace(
            inputs,
            document_index=inputs.document_index[mine],
            loss_mask=inputs.loss_mask[mine],
            old_logps=inputs.old_logps[mine],
            ref_logps=None if inputs.ref_logps is None else inputs.ref_logps[mine],
            counted=torch.arange(inputs.label_counts.numel()) % size == rank,
            complete=axis.complete(rank),
        )
        value, metrics = loss(logps, entropies, part)
        value.backward()
        return value.detach(), logps.grad, entropies.grad, metrics

    found = on_threads(run, size)
    whole, whole_entropy = new.clone().requires_grad_(), entropy.clone().requires_grad_()
    value, metrics = loss(whole, whole_entropy, inputs)
    value.backward()
    torch.testing.assert_close(sum(f[0] for f in found), value.detach(), rtol=1e-10, atol=1e-12)
    for rank, (_, d_logps, d_entropy, _) in enumerate(found):
        for got, want in ((d_logps, whole.grad), (d_entropy, whole_entropy.grad)):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want[shares[rank]], rtol=1e-10, atol=1e-14)
    merged = merge_pairs(f[-1] for f in found)
    assert merged.keys() == metrics.keys()
    for name, pair in metrics.items():
        if name.startswith("ratio/m") and name != "ratio/mean":  # extremes, whose weight says nothing
            merged[name], pair = (merged[name][0],), (pair[0],)
        if pair[-1] == 1:  # sums over the ranks
            merged[name], pair = (merged[name][0],), (pair[0],)
        torch.testing.assert_close(torch.stack(merged[name]), torch.stack(pair), check_dtype=False, msg=name)


@pytest.mark.parametrize(("build", "expected"), [(GSPOLoss, 1), (GRPOLoss, 2)])
def test_a_sequence_objective_sums_over_the_ranks_once(build, expected):
    """A token objective once more, for its metrics per document."""
    new, entropy, inputs = objectives.pack(objectives.random_documents([5, 8]))
    axis = Axis(1)
    build()(new.requires_grad_(), entropy, replace(inputs, complete=axis.complete(0)))[0].backward()
    assert axis.num_sums == expected
