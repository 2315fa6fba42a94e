"""Objectives whose documents span ranks: any split has the whole's value, metrics and gradients.

The ranks are threads that meet where sums are completed; :mod:`tests.distributed.test_context` has
real ones. The same of chunks of whole documents, which the loss head makes.
"""

import random
import threading
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from gspo import parallel
from gspo.data.layout import pack_documents
from gspo.losses import (
    CISPOLoss,
    FSPOLoss,
    GRPOLoss,
    GSPOLoss,
    GSPOTokenLoss,
    MultiScaleLoss,
    SegmentLoss,
)
from gspo.losses.inputs import LossInputs
from gspo.metrics import Mean, Metrics, NotFinite, StepMetrics, merge
from gspo.policy.microbatch import Microbatch
from gspo.types import Axis, field_specs
from gspo.update import accumulate_gradients
from tests import tiny_policy
from tests.distributed.arrangements import build_policy
from tests.losses import objectives

LOSSES = {
    "gspo": GSPOLoss,
    "grpo": GRPOLoss,
    "gspo_root": partial(GSPOLoss, length_exponent=0.5),
    "gspo_token": GSPOTokenLoss,
    "dual": partial(GRPOLoss, dual_clip=1.3),
    "segment": SegmentLoss,
    "multi_scale": partial(MultiScaleLoss, token_share=0.3),
    "cispo": CISPOLoss,
    "fspo": FSPOLoss,
}
OPTIONS = {
    "plain": {},
    "per_token": {"aggregation": "token"},
    "penalties": {"kl_coef": 0.1, "entropy_coef": 0.05},
    "token_advantages": {},
    "correction": {"correction": "sequence_geometric", "correction_high": 1.05},
}
each_loss = pytest.mark.parametrize("name", LOSSES)
each_option = pytest.mark.parametrize("option", OPTIONS)


class ThreadAxis:
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
    results = [None] * size
    errors = []

    def run(rank):
        try:
            results[rank] = function(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def random_case(seed):
    """Documents, spans of masks among them, and how many ranks share them."""
    rng = random.Random(seed)
    documents = objectives.random_documents(
        [rng.randint(1, 40) for _ in range(rng.randint(1, 7))], seed=seed
    )
    for d in documents:
        start = rng.randrange(d["mask"].numel())
        d["mask"][start : start + rng.randint(0, 4)] = False
    if seed % 4 == 0:  # quarantined, by a token that one rank holds
        d = documents[0]
        d["mask"][-1] = True
        d["new"][-1] = torch.nan
    return documents, rng.choice([1, 2, 3, 4]), rng


def build_case(name, option, documents):
    """A loss with its inputs."""
    loss = LOSSES[name](clip_low=0.2, clip_high=0.25, **OPTIONS[option])
    new, entropy, inputs = objectives.pack(
        documents, with_segments=name == "segment", per_token=option == "token_advantages"
    )
    if not loss.kl_coef:
        inputs = replace(inputs, ref_logps=None)
    if loss.correction:
        inputs = replace(
            inputs, sampler_logps=inputs.old_logps - 0.1 * torch.sin(torch.arange(new.numel()))
        )
    return loss, new, entropy, inputs


@dataclass
class Result:
    """A loss of some tokens with its gradients."""

    value: torch.Tensor
    grad: torch.Tensor
    entropy_grad: torch.Tensor | None
    metrics: Metrics
    not_finite: NotFinite


def backward(loss, new, entropy, inputs):
    new, entropy = new.clone().requires_grad_(), entropy.clone().requires_grad_()
    value, metrics, not_finite = loss(new, entropy, inputs)
    value.backward()
    return Result(value.detach(), new.grad, entropy.grad, metrics, not_finite)


def take_slots(inputs, chosen):
    """The inputs with some of their slots."""
    changed = {}
    for name, spec in field_specs(LossInputs).items():
        values = getattr(inputs, name)
        if spec.axis == Axis.SLOT and values is not None:
            changed[name] = values[chosen]
    if inputs.segments is not None:
        changed["segments"] = replace(inputs.segments, index=inputs.segments.index[chosen])
    return replace(inputs, **changed)


def assert_accounts_add_up(results, whole):
    merged = merge(result.metrics for result in results)
    assert merged.keys() == whole.metrics.keys()
    for name, metric in whole.metrics.items():
        assert type(merged[name]) is type(metric)
        torch.testing.assert_close(merged[name].value, metric.value, check_dtype=False, msg=name)
        if isinstance(metric, Mean):  # the weight of others says nothing
            torch.testing.assert_close(
                merged[name].weight, metric.weight, check_dtype=False, msg=name
            )
    assert sum(r.not_finite.documents for r in results) == whole.not_finite.documents
    assert sum(r.not_finite.tokens for r in results) == whole.not_finite.tokens


@pytest.mark.parametrize("seed", range(12))
@each_option
@each_loss
def test_any_split_is_the_whole(name, option, seed):
    documents, size, rng = random_case(seed)
    loss, new, entropy, inputs = build_case(name, option, documents)
    slots = list(range(new.numel()))
    rng.shuffle(slots)
    rank_of = torch.tensor([rng.randrange(size) for _ in slots])  # some ranks may hold nothing
    shares = [
        torch.tensor([slot for slot in slots if rank_of[slot] == rank], dtype=torch.int64)
        for rank in range(size)
    ]
    axis = ThreadAxis(size)

    def run(rank):
        mine = shares[rank]
        here = replace(
            take_slots(inputs, mine),
            counted=torch.arange(inputs.label_counts.numel()) % size == rank,
            complete=axis.complete(rank),
        )
        return backward(loss, new[mine], entropy[mine], here)

    ranks = on_threads(run, size)
    whole = backward(loss, new, entropy, inputs)
    torch.testing.assert_close(sum(r.value for r in ranks), whole.value, rtol=1e-10, atol=1e-12)
    for result, share in zip(ranks, shares, strict=True):
        for got, want in (
            (result.grad, whole.grad),
            (result.entropy_grad, whole.entropy_grad),
        ):
            assert (got is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(got, want[share], rtol=1e-10, atol=1e-14)
    assert_accounts_add_up(ranks, whole)


@pytest.mark.parametrize("seed", range(4))
@each_option
@each_loss
def test_chunks_of_whole_documents_are_the_whole(name, option, seed):
    documents, _, rng = random_case(seed)
    for d in documents:  # rows without a label are gone before the head
        kept = d["mask"].clone()
        d.update({k: v[kept] for k, v in d.items() if v.dim()})
    loss, new, entropy, inputs = build_case(
        name, option, [d for d in documents if d["mask"].numel()]
    )
    rows = inputs.loss_mask  # all but padding
    new, entropy = new[rows], entropy[rows]
    inputs = take_slots(inputs, rows)
    counts = inputs.label_counts.tolist()
    cuts = [
        0,
        *sorted(rng.sample(range(1, len(counts)), rng.randint(0, len(counts) - 1))),
        len(counts),
    ]
    whole = backward(loss, new, entropy, inputs)
    chunks = []
    for first, last in zip(cuts, cuts[1:], strict=False):
        span = slice(sum(counts[:first]), sum(counts[:last]))
        chunk_inputs = inputs.of_documents(counts, first, last)
        chunks.append(backward(loss, new[span], entropy[span], chunk_inputs))
    torch.testing.assert_close(sum(c.value for c in chunks), whole.value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.cat([c.grad for c in chunks]), whole.grad, rtol=1e-10, atol=1e-14
    )
    if whole.entropy_grad is not None:
        torch.testing.assert_close(
            torch.cat([c.entropy_grad for c in chunks]), whole.entropy_grad, rtol=1e-10, atol=1e-14
        )
    assert_accounts_add_up(chunks, whole)


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    parallel.init_process_group(torch.device("cpu"))
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["segment", "gspo_token"])
def test_segments_of_a_batch_go_through_the_head(one_rank, name):
    """In chunks as in one, and unlike documents without segments."""
    batch = pack_documents(tiny_policy.documents(), 64)
    cuts = batch.loss_mask.cumsum(0) // 4
    batch.segment_index = torch.unique(1000 * batch.document_index + cuts, return_inverse=True)[1]
    num_segments = int(batch.segment_index.max()) + 1
    batch.segment_advantages = torch.randn(num_segments, generator=torch.Generator().manual_seed(0))

    def metrics_and_gradients(kernel, **options):
        loss = LOSSES[name](clip_low=0.01, clip_high=0.01)
        policy = build_policy(loss, kernel=kernel, **options)
        microbatch = Microbatch.prepare(batch, torch.device("cpu"))
        (output,) = accumulate_gradients(policy, [microbatch], 7.0)
        step = StepMetrics()
        step.add(output.metrics, output.not_finite)
        return step.reduce(), [p.grad.full_tensor() for p in policy.parameters()]

    metrics, grads = metrics_and_gradients("compile", chunk_size=40)
    expected, wanted = metrics_and_gradients("reference")
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), key
    for grad, want in zip(grads, wanted, strict=True):
        assert 0 < want.norm() and (grad - want).norm() <= 1e-5 * want.norm()
    batch.segment_advantages = torch.ones(num_segments)
    _, others = metrics_and_gradients("reference")
    assert any((a - b).norm() > 0.1 * b.norm() for a, b in zip(others, wanted, strict=True))


@pytest.mark.parametrize("kernel", ["reference", "compile"])
@pytest.mark.parametrize("name", ["segment", "grpo"])
def test_padding_alone_needs_no_segments(one_rank, name, kernel):
    """A rank whose documents have ended goes along with it."""
    microbatch = Microbatch.prepare(pack_documents([]), torch.device("cpu"))
    policy = build_policy(LOSSES[name](), kernel=kernel)
    loss = policy(microbatch).loss
    loss.backward()
    assert loss == 0 and not any(p.grad.full_tensor().any() for p in policy.parameters())


TOKEN_LEVEL = {"grpo", "gspo_token", "dual", "multi_scale", "cispo"}


@each_loss
@pytest.mark.parametrize("per_token", [False, True])
def test_an_objective_sums_over_the_ranks_once(name, per_token):
    """Where tokens are the units once more, for metrics per document."""
    documents = objectives.random_documents([5, 8])
    loss, new, entropy, inputs = build_case(
        name, "token_advantages" if per_token else "plain", documents
    )
    axis = ThreadAxis(1)
    output = loss(new.requires_grad_(), entropy, replace(inputs, complete=axis.complete(0)))
    output.loss.backward()
    assert axis.num_sums == (2 if name in TOKEN_LEVEL else 1)
