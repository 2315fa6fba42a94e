"""Every objective against a float64 restatement, in value and gradient, and the accounting."""

import inspect
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from gspo.errors import InputError
from gspo.losses import (
    CISPOLoss,
    FSPOLoss,
    GRPOLoss,
    GSPOLoss,
    GSPOTokenLoss,
    MultiScaleLoss,
    SegmentLoss,
    functional,
)
from gspo.losses.inputs import LossInputs, LossTraits, find_segments, traits_of
from gspo.losses.units import document_means
from gspo.metrics import Mean, NotFinite, Sum
from gspo.types import Axis
from tests.losses import objectives

LENGTHS = {"single": [7], "one_token": [1], "many": [1, 63, 5, 257, 12], "equal": [4, 4, 4]}
AGGREGATIONS = ["document", "token", "token_over_documents", "constant", "token_over_batch_size"]
CLIP_RANGES = {"narrow": (3e-4, 4e-4), "wide": (0.2, 0.28)}
LOSSES = {
    "gspo": (GSPOLoss, objectives.gspo),
    "grpo": (GRPOLoss, objectives.grpo),
    "gspo_root": (partial(GSPOLoss, length_exponent=0.5), partial(objectives.gspo, exponent=0.5)),
    "gspo_token": (GSPOTokenLoss, objectives.mix),
    "segment": (SegmentLoss, objectives.segments),
    "multi_scale": (partial(MultiScaleLoss, token_share=0.3), partial(objectives.mix, share=0.3)),
    "cispo": (CISPOLoss, objectives.cispo),
    "fspo": (FSPOLoss, objectives.fspo),
}
CLIPPED = [name for name in LOSSES if name != "cispo"]
DUAL = [name for name in CLIPPED if name != "fspo"]
STOPPED = {"gspo_token": GSPOTokenLoss, "multi_scale": partial(MultiScaleLoss, token_share=0.3)}

each_loss = pytest.mark.parametrize("name", LOSSES)
each_clipped_loss = pytest.mark.parametrize("name", CLIPPED)
each_dual_loss = pytest.mark.parametrize("name", DUAL)
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
each_clip_range = pytest.mark.parametrize("clip_range", CLIP_RANGES.values(), ids=CLIP_RANGES)


def build(name, low, high, aggregation="document", **options):
    constants = {"constant_length": 100, "batch_size": 64}
    return LOSSES[name][0](
        clip_low=low, clip_high=high, aggregation=aggregation, **constants, **options
    )


def pair(metric):
    """A metric's value and weight as numbers."""
    return int(metric.value), int(metric.weight)


def pack(name, documents, **options):
    return objectives.pack(documents, with_segments=name == "segment", **options)


def gradients(loss, documents, per_token=False):
    """The gradient of a loss on packed documents, document by document."""
    output, grads = backward(loss, documents, per_token)
    return output.loss.detach(), grads, output.metrics


def backward(loss, documents, per_token=False):
    """What a loss returns for packed documents, with its gradient document by document."""
    name = "segment" if isinstance(loss, SegmentLoss) else ""
    new, entropy, inputs = pack(name, documents, per_token=per_token)
    new.requires_grad_()
    output = loss(new, entropy, inputs)
    (grad,) = torch.autograd.grad(output.loss, new)
    return output, list(grad.split([d["old"].numel() for d in documents] + [3]))


def assert_same(loss, restated, documents, per_token=False):
    value, grads, metrics = gradients(loss, documents, per_token)
    expected, expected_grads = expected_gradients(restated, documents)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(grads, expected_grads, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert grads[-1].eq(0).all()  # padding
    return metrics


def expected_gradients(restated, documents):
    for d in documents:
        d["new"] = d["new"].detach().requires_grad_()
    value = restated(documents) + 0 * sum(
        d["new"].sum() for d in documents
    )  # a graph, even if every term is clipped
    return value.detach(), torch.autograd.grad(value, [d["new"] for d in documents])


@each_loss
@each_lengths
@each_clip_range
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_equals_restatement(name, lengths, clip_range, aggregation):
    restated = partial(
        LOSSES[name][1], low=clip_range[0], high=clip_range[1], aggregation=aggregation
    )
    assert_same(
        build(name, *clip_range, aggregation), restated, objectives.random_documents(lengths)
    )


@each_loss
@each_lengths
def test_advantages_per_token_equal_restatement(name, lengths):
    restated = partial(LOSSES[name][1], low=0.2, high=0.25, per_token=True)
    if name == "cispo":
        restated = partial(restated, aggregation="document")
    assert_same(
        build(name, 0.2, 0.25), restated, objectives.random_documents(lengths), per_token=True
    )


@each_dual_loss
def test_dual_clip_equals_restatement(name):
    documents = objectives.random_documents([1, 63, 5, 257, 12], scale=0.8)
    documents[0]["new"] = documents[0]["old"] + 2
    documents[0]["advantage"] = torch.tensor(-1.0, dtype=torch.float64)
    metrics = assert_same(
        build(name, 0.2, 0.3, dual_clip=1.5),
        partial(LOSSES[name][1], low=0.2, high=0.3, dual=1.5),
        documents,
    )
    assert metrics["clip/binding_document"].value > 0


@pytest.mark.parametrize("name", ["gspo", "grpo"])
def test_without_a_clip_range_nothing_is_clipped(name):
    documents = objectives.random_documents([1, 63, 5], scale=0.8)
    restated = partial(LOSSES[name][1], low=None, high=None, unclipped=True)
    metrics = assert_same(build(name, None, None), restated, documents)
    assert metrics["clip/any_document"].value == 0


@pytest.mark.parametrize("name", ["grpo", "cispo"])
@pytest.mark.parametrize("side", ["low", "high"])
def test_one_side_of_the_clip_range_can_be_open(name, side):
    clip_range = {"low": 0.2, "high": 0.3} | {side: None}
    restated = partial(
        LOSSES[name][1], **({"low": torch.inf, "high": torch.inf} if name == "grpo" else {})
    )
    widths = {k: torch.inf if v is None and name == "grpo" else v for k, v in clip_range.items()}
    documents = objectives.random_documents([9, 30], scale=0.8)
    assert_same(
        build(name, clip_range["low"], clip_range["high"], "token"),
        partial(restated, aggregation="token", **widths),
        documents,
    )


@pytest.mark.parametrize("name", ["gspo", "grpo", "gspo_root", "segment", "fspo"])
def test_gradient_equals_finite_differences(name):
    new, entropy, inputs = pack(name, objectives.random_documents([3, 5], scale=0.05))
    loss = build(name, 0.2, 0.2, kl_coef=0.1, entropy_coef=0.1)
    assert torch.autograd.gradcheck(lambda x: loss(x, entropy, inputs)[0], new.requires_grad_())


@pytest.mark.parametrize("name", STOPPED)
def test_gradient_equals_finite_differences_with_the_mean_held(name, monkeypatch):
    """The objective that these stand for has a constant where they stop the gradient."""
    new, entropy, inputs = objectives.pack(objectives.random_documents([3, 5], scale=0.05))
    loss = build(name, 0.2, 0.2)
    _, grads, _ = gradients(loss, objectives.random_documents([3, 5], scale=0.05))
    log_ratio = torch.where(inputs.loss_mask, new - inputs.old_logps, 0.0)
    means = document_means(log_ratio, inputs)[inputs.document_index]
    monkeypatch.setattr(
        functional, "_sequence_exponent", lambda units, *_: means + (units.log_ratio - log_ratio)
    )
    assert torch.autograd.gradcheck(lambda x: loss(x, entropy, inputs)[0], new.requires_grad_())
    torch.testing.assert_close(
        torch.autograd.grad(loss(new, entropy, inputs)[0], new)[0], torch.cat(grads)
    )


def same(a, b, documents, **options):
    """Two losses agree in value and gradient."""
    value, grads, _ = gradients(a, documents, **options)
    expected, expected_grads, _ = gradients(b, documents, **options)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat(grads), torch.cat(expected_grads), rtol=1e-10, atol=1e-14)
    assert torch.cat(grads).abs().sum() > 0


@pytest.mark.parametrize("aggregation", ["document", "token"])
@pytest.mark.parametrize("clip_range", CLIP_RANGES.values(), ids=CLIP_RANGES)
def test_gspo_token_with_one_advantage_per_document_is_gspo(aggregation, clip_range):
    documents = objectives.random_documents([1, 63, 5, 257, 12])
    same(
        build("gspo_token", *clip_range, aggregation),
        build("gspo", *clip_range, aggregation),
        documents,
    )


def test_gspo_token_gives_credit_to_the_token_that_has_the_advantage():
    documents = objectives.random_documents([6], scale=0.01)
    documents[0]["token_advantage"] = torch.zeros(8, dtype=torch.float64)
    documents[0]["token_advantage"][5] = 2.0
    _, per_token, _ = gradients(build("gspo_token", 0.2, 0.2), documents, per_token=True)
    assert per_token[0].nonzero().flatten().tolist() == [5]
    value, of_document, _ = gradients(build("gspo", 0.2, 0.2), documents, per_token=True)
    assert of_document[0].count_nonzero() == 6  # of a document, the mean
    torch.testing.assert_close(of_document[0].sum(), per_token[0].sum())


@pytest.mark.parametrize(("share", "other"), [(0.0, "gspo_token"), (1.0, "grpo")])
@pytest.mark.parametrize("per_token", [False, True])
def test_multi_scale_ends_in_gspo_token_and_grpo(share, other, per_token):
    documents = objectives.random_documents([1, 63, 5, 257])
    loss = MultiScaleLoss(token_share=share, clip_low=0.2, clip_high=0.25)
    same(loss, build(other, 0.2, 0.25), documents, per_token=per_token)


@pytest.mark.parametrize(("cut", "other"), [("document", "gspo"), ("token", "grpo")])
@pytest.mark.parametrize("aggregation", ["document", "token"])
def test_segments_as_long_as_a_document_or_a_token(cut, other, aggregation):
    """A document's weight is spread by tokens: one token per segment is GRPO, weighed alike."""
    documents = objectives.random_documents([1, 63, 5, 12])
    for d in documents:
        numbers = torch.arange(d["old"].numel())
        d["segment"] = numbers if cut == "token" else torch.zeros_like(numbers)
    new, entropy, inputs = objectives.pack(documents)
    offset = 1000 * inputs.document_index + torch.cat(
        [d["segment"] for d in documents] + [torch.zeros(3).long()]
    )
    segments = find_segments(offset, inputs.document_index, inputs.loss_mask)
    values = []
    for loss in (build("segment", 0.2, 0.25, aggregation), build(other, 0.2, 0.25, aggregation)):
        leaf = new.clone().requires_grad_()
        value = loss(leaf, entropy, replace(inputs, segments=segments)).loss
        values.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-14)


def test_a_segment_of_two_documents_is_refused():
    index = torch.tensor([0, 1, 1, 2])
    with pytest.raises(ValueError, match="a segment lies in two documents"):
        find_segments(index, torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool))
    find_segments(
        index, torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, True, True])
    )  # no label there


def test_segment_loss_without_segments_names_the_remedy():
    new, entropy, inputs = objectives.pack(objectives.random_documents([4]))
    with pytest.raises(
        InputError, match=r"^segments: the objective has a ratio per segment, .* segment_index"
    ):
        SegmentLoss()(new, entropy, inputs)


def test_fspo_clip_range_grows_with_the_root_of_the_length():
    """Both products are at 0.9 of their clip range: neither is clipped. At 1.1 both are."""
    documents = objectives.random_documents([16, 400])
    for share, clipped in ((0.9, 0), (1.1, 2)):
        for d in documents:
            d["new"] = d["old"] + share * 0.2 / d["mask"].sum() ** 0.5
            d["advantage"] = torch.tensor(1.0, dtype=torch.float64)
        _, _, metrics = gradients(FSPOLoss(clip_low=0.2, clip_high=0.2), documents)
        assert metrics["clip/binding_document"].value == clipped


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_at_ratio_one_is_that_of_gspo(aggregation):
    documents = objectives.random_documents([1, 9, 30], scale=0.0)
    _, gspo, _ = gradients(build("gspo", 3e-4, 4e-4, aggregation), documents)
    for name in ("grpo", "gspo_token", "segment", "multi_scale", "cispo"):
        _, other, _ = gradients(build(name, 0.2, 0.2, aggregation), documents)
        for a, b in zip(gspo, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert gspo[0].abs().sum() > 0


@each_clipped_loss
@pytest.mark.parametrize(
    ("shift", "advantage", "flows"),
    [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)],
    ids=["above_positive", "above_negative", "below_positive", "below_negative"],
)
def test_clip_stops_the_gradient_on_its_side(name, shift, advantage, flows):
    documents = objectives.random_documents([6])
    documents[0]["new"] = documents[0]["old"] + shift
    documents[0]["advantage"] = torch.tensor(advantage, dtype=torch.float64)
    _, grads, metrics = gradients(build(name, 0.2, 0.2), documents)
    assert bool(grads[0].abs().sum() > 0) is flows
    assert metrics["clip/any_document"].value == 1
    assert metrics["clip/binding_document"].value == (0 if flows else 1)
    assert metrics["clip/binding_token"] == Mean((0 if flows else 6), 6)
    assert metrics["clip/any_token"] == Mean(6, 6)
    side = "clip/high" if shift > 0 else "clip/low"
    assert metrics[side].value == (0 if flows else metrics[side].weight)


@each_loss
def test_clipped_documents_are_counted_by_length(name):
    documents = objectives.random_documents([1, 64, 65, 256, 300, 1024, 1025, 2000, 7], scale=0.0)
    for i, d in enumerate(documents):
        d["new"], d["advantage"] = (
            d["old"] + (0.5 if i % 2 else 0.0),
            torch.tensor(1.0, dtype=torch.float64),
        )
    new, entropy, inputs = objectives.pack(documents, with_segments=name == "segment")
    metrics = LOSSES[name][0](clip_low=0.2, clip_high=0.2)(new, entropy, inputs).metrics
    counts = [
        pair(metric) for key, metric in metrics.items() if key.startswith("clip/binding_document_")
    ]
    binds = name != "cispo"  # whose gradient never vanishes
    assert counts == [(binds, 3), (binds, 2), (binds, 2), (binds, 2)]


def test_gspo_value_by_hand():
    # Two labels, log-ratios 0.1 and 0.3: s = exp(0.2) = 1.2214 is above 1.2, so that a positive
    # advantage is clipped at 1.2.
    inputs = LossInputs(
        document_index=torch.tensor([0, 0, 1]),
        loss_mask=torch.tensor([True, True, False]),
        old_logps=torch.tensor([-1.0, -2.0, 0.0]),
        advantages=torch.tensor([2.0, 0.0]),
        label_counts=torch.tensor([2, 0]),
    )
    logps = torch.tensor([-0.9, -1.7, 0.0])
    loss, metrics, _ = GSPOLoss(clip_low=0.2, clip_high=0.2)(logps, torch.zeros(3), inputs)
    assert loss.item() == pytest.approx(-2.4)
    loss, *_ = GSPOLoss(clip_low=0.2, clip_high=0.3)(logps, torch.zeros(3), inputs)
    assert loss.item() == pytest.approx(-2 * 2.718281828**0.2, rel=1e-6)
    assert metrics["ratio/mean"].value.item() == pytest.approx(1.221402758, rel=1e-6)


def by_hand(loss, log_ratios, advantage, old=-1.0):
    """A loss and its gradient on one document."""
    count = len(log_ratios)
    inputs = LossInputs(
        document_index=torch.zeros(count, dtype=torch.int64),
        loss_mask=torch.ones(count, dtype=torch.bool),
        old_logps=torch.full((count,), old, dtype=torch.float64),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        label_counts=torch.tensor([count]),
    )
    new = (inputs.old_logps + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_()
    value, metrics, _ = loss(new, torch.zeros_like(new), inputs)
    return value.item(), torch.autograd.grad(value, new)[0].tolist(), metrics


def test_dual_clip_by_hand():
    # Ratios 4 and 2 with A = -1: a loss of 4 is capped at 3, and its gradient stops; 2 stays.
    loss = GRPOLoss(clip_low=0.2, clip_high=0.2, dual_clip=3.0, aggregation="token")
    value, grads, metrics = by_hand(loss, [math.log(4), math.log(2)], -1.0)
    assert value == pytest.approx(3 + 2)
    assert grads == pytest.approx([0, 2])
    assert metrics["clip/high"] == Mean(1, 2)
    value, grads, _ = by_hand(loss, [math.log(4), math.log(2)], 1.0)  # A > 0: the range alone
    assert value == pytest.approx(-2.4) and grads == [0, 0]


def test_cispo_by_hand():
    # Ratios 8, truncated to 6, and 0.5; A = 2; log-probabilities of -1 + log 8 and -1 - log 2.
    value, grads, metrics = by_hand(CISPOLoss(), [math.log(8), -math.log(2)], 2.0)
    assert value == pytest.approx(-2 * (6 * (math.log(8) - 1) + 0.5 * (-math.log(2) - 1)))
    assert grads == pytest.approx([-12, -1])
    assert metrics["clip/any_document"].value == 1 and metrics["clip/binding_document"].value == 0


def test_length_exponent_by_hand():
    for exponent, expected in ((1.0, 0.1), (0.5, 0.2), (0.0, 0.4)):  # of four tokens at 0.1
        value, grads, _ = by_hand(
            GSPOLoss(clip_low=0.9, clip_high=9, length_exponent=exponent), [0.1] * 4, 1.0
        )
        assert value == pytest.approx(-math.exp(expected))
        assert grads == pytest.approx([-math.exp(expected) / 4**exponent] * 4)


def test_verl_bounds_large_ratios_only():
    loss = partial(GSPOTokenLoss, clip_low=None, clip_high=None)
    for log_ratio, below, value, slope, bounded in (
        (12.0, False, -math.exp(10), 0, 1),
        (-12.0, False, -math.exp(-12), -math.exp(-12), 0),
        (-12.0, True, -math.exp(-10), 0, 1),
    ):
        got, grads, metrics = by_hand(loss(bound_below=below), [log_ratio], 1.0)
        assert got == pytest.approx(value) and grads == pytest.approx([slope])
        assert metrics["bounded_documents"].value == bounded


@each_loss
def test_values_outside_the_mask_do_not_matter(name):
    documents = objectives.random_documents([5, 8])
    loss = build(name, 0.2, 0.2, kl_coef=0.1)
    clean, clean_grads, _ = gradients(loss, documents)
    for d in documents:
        for key in ("new", "old", "ref", "entropy", "token_advantage"):
            d[key] = torch.where(d["mask"], d[key], -torch.inf)
    value, grads, _ = gradients(loss, documents)
    assert value == clean
    for a, b in zip(grads, clean_grads, strict=True):
        assert torch.equal(a, b)


@each_loss
def test_several_spans_in_one_document(name):
    documents = objectives.random_documents([20, 11])
    documents[0]["mask"][5:9] = False
    documents[0]["mask"][14:15] = False
    restated = partial(LOSSES[name][1], low=0.2, high=0.2, aggregation="document")
    assert_same(build(name, 0.2, 0.2), restated, documents)


@each_loss
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", ["document", "token"])
def test_penalties_equal_restatement(name, estimator, aggregation):
    documents = objectives.random_documents([4, 17])
    knobs = {"kl_coef": 0.3, "entropy_coef": 0.2}
    loss = build(name, 0.2, 0.2, aggregation, kl_estimator=estimator, **knobs)
    value, grads, _ = gradients(loss, documents)

    def restated(documents):
        policy = LOSSES[name][1](documents, low=0.2, high=0.2, aggregation=aggregation)
        return policy + objectives.penalties(
            documents, estimator=estimator, aggregation=aggregation, **knobs
        )

    expected, expected_grads = expected_gradients(restated, documents)
    torch.testing.assert_close(value, expected)
    for got, want in zip(grads, expected_grads, strict=False):
        torch.testing.assert_close(got, want)


def test_entropy_bonus_gradient_flows_to_the_entropy():
    _, entropy, inputs = objectives.pack(objectives.random_documents([4]))
    loss, *_ = GSPOLoss(entropy_coef=0.5)(inputs.old_logps, entropy.requires_grad_(), inputs)
    (grad,) = torch.autograd.grad(loss, entropy)
    torch.testing.assert_close(grad, torch.where(inputs.loss_mask, -0.5 / 4, 0.0).double())


@each_loss
@pytest.mark.parametrize("poison", ["new", "old", "advantage", "token_advantage"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "inf"])
def test_document_that_is_not_finite_is_quarantined(name, poison, value):
    documents = objectives.random_documents([5, 8, 3])
    per_token = poison == "token_advantage"
    clean, clean_grads, _ = gradients(
        build(name, 0.2, 0.2), [documents[0], documents[2]], per_token
    )
    if poison == "advantage":
        documents[1]["advantage"] = torch.tensor(value, dtype=torch.float64)
    else:
        documents[1][poison][4] = value
    output, grads = backward(build(name, 0.2, 0.2), documents, per_token)
    torch.testing.assert_close(output.loss.detach(), clean)
    assert grads[1].eq(0).all()
    torch.testing.assert_close(grads[2], clean_grads[1])
    assert output.metrics["quarantined_documents"] == Sum(1)
    assert output.not_finite == NotFinite(1, 8)
    assert all(metric.value.isfinite() for metric in output.metrics.values())


def test_bound_on_the_mean_log_ratio_is_counted():
    documents = objectives.random_documents([5, 5])
    documents[0]["new"] = documents[0]["old"] + 50.0
    documents[0]["advantage"] = torch.tensor(-1.0, dtype=torch.float64)
    value, grads, metrics = gradients(GSPOLoss(log_ratio_bound=2.0), documents)
    assert metrics["bounded_documents"].value == 1
    assert metrics["ratio/max"].value.item() == pytest.approx(7.38905609893065)
    assert grads[0].eq(0).all()
    assert value.isfinite()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_long_documents_inside_the_length_fair_clip_range_keep_their_gradient(advantage):
    (document,) = objectives.random_documents([10_000])
    document["new"] = document["old"] + 1.5e-3  # a sum of 15, in a range of 20
    document["advantage"] = torch.tensor(advantage, dtype=torch.float64)
    _, grads, metrics = gradients(FSPOLoss(), [document])
    torch.testing.assert_close(
        grads[0][document["mask"]], torch.full((10_000,), -advantage * math.exp(15)).double()
    )
    assert metrics["bounded_documents"].value == 0


@each_loss
def test_metrics_do_not_disturb_the_loss(name):
    new, entropy, inputs = pack(name, objectives.random_documents([5, 8]))
    loss, metrics, not_finite = build(name, 0.2, 0.2)(new.requires_grad_(), entropy, inputs)
    numbers = [number for metric in metrics.values() for number in (metric.value, metric.weight)]
    assert not any(torch.as_tensor(number).requires_grad for number in [*numbers, *not_finite])
    before = torch.autograd.grad(loss, new, retain_graph=True)[0]
    sum(metric.value for metric in metrics.values())
    assert torch.equal(before, torch.autograd.grad(loss, new)[0])


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if name != "gspo_root"]
)  # whose range is wider
def test_metrics_by_hand(name):
    documents = objectives.random_documents([2, 4])
    documents[0]["new"] = documents[0]["old"] + 0.1
    documents[1]["new"] = documents[1]["old"] - 0.2
    _, _, metrics = gradients(build(name, 0.15, 0.15), documents)
    k3 = 2 * (torch.e**0.1 - 1 - 0.1) + 4 * (torch.e**-0.2 - 1 + 0.2)
    assert metrics["kl_new_old"].value.item() == pytest.approx(k3)
    assert metrics["kl_new_old"].weight == 2
    assert metrics["log_ratio/abs_document"].value.item() == pytest.approx(0.3)
    assert metrics["_log_ratio_sq"].value.item() == pytest.approx(2 * 0.01 + 4 * 0.04)
    assert metrics["clip/any_document"] == Mean(1, 2)


@each_loss
def test_compiled_form_agrees(name):
    new, entropy, inputs = pack(name, objectives.random_documents([5, 8, 1]))
    loss = build(name, 0.2, 0.2, kl_coef=0.1, entropy_coef=0.1)
    compiled = torch.compile(loss)
    values = []
    for form in (loss, compiled):
        leaf = new.detach().clone().requires_grad_()
        value, metrics, not_finite = form(leaf, entropy, inputs)
        numbers = {name: metric.value for name, metric in metrics.items()}
        grad = torch.autograd.grad(value, leaf)[0]
        values.append((value.detach(), grad, numbers, tuple(not_finite)))
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "by_documents", "expected"),
    [
        ("document", False, 7),
        ("token", False, 50),
        ("token", True, 7),
        ("token_over_documents", False, 7),
    ],
)
def test_denominator_is_the_steps_total(aggregation, by_documents, expected):
    loss = GSPOLoss(aggregation=aggregation, normalize_by_documents=by_documents)
    assert loss.denominator(7, 50) == expected


def test_denominator_of_a_batch_size_is_that():
    assert GSPOLoss(aggregation="token_over_batch_size", batch_size=64).denominator(7, 50) == 64


def test_denominator_of_constant_is_documents_times_length():
    assert GRPOLoss(aggregation="constant", constant_length=100).denominator(7, 50) == 700


def test_normalize_by_documents_keeps_the_token_weights():
    documents = objectives.random_documents([2, 9])
    token, _, _ = gradients(GSPOLoss(aggregation="token", normalize_by_documents=True), documents)
    restated = objectives.gspo(documents, low=3e-4, high=4e-4, aggregation="token")
    torch.testing.assert_close(token, restated)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"clip_low": -0.1}, "^clip_low: "),
        ({"clip_low": 1.5}, "^clip_low: "),
        ({"clip_high": -0.1}, "^clip_high: "),
        ({"aggregation": "mean"}, "^aggregation: "),
        ({"aggregation": ["document"]}, "^aggregation: "),
        (
            {"normalize_by_documents": "flase"},
            "^normalize_by_documents: 'flase' must be true or false",
        ),
        ({"clip_high": True}, "^clip_high: True must be a finite number, or null"),
        ({"clip_high": "0.2"}, "^clip_high: "),
        ({"kl_coef": torch.inf}, "^kl_coef: inf must be a finite number"),
        ({"kl_coef": None}, "^kl_coef: None must be a finite number"),
        ({"log_ratio_bound": torch.inf}, "^log_ratio_bound: "),
        (
            {"aggregation": "constant", "constant_length": 1.5},
            "^constant_length: 1.5 must be a finite whole",
        ),
        ({"aggregation": "constant"}, "^aggregation: 'constant' divides by constant_length"),
        ({"aggregation": "constant", "constant_length": 0}, "^constant_length: "),
        (
            {"aggregation": "token_over_batch_size"},
            "^aggregation: 'token_over_batch_size' divides by batch_size",
        ),
        ({"kl_estimator": "k4"}, "^kl_estimator: "),
        ({"log_ratio_bound": 0.0}, "^log_ratio_bound: "),
        (
            {"aggregation": "constant", "constant_length": 9, "normalize_by_documents": True},
            "^normalize_by_documents: True contradicts aggregation 'constant'",
        ),
    ],
)
@each_loss
def test_bad_option_names_its_key(name, options, key):
    if name == "fspo" and options.get("clip_low") == 1.5:
        return  # nats
    with pytest.raises(InputError, match=key):
        LOSSES[name][0](**options)


@pytest.mark.parametrize(
    ("loss", "options", "key"),
    [
        (GRPOLoss, {"dual_clip": 1.0}, "^dual_clip: "),
        (GSPOLoss, {"length_exponent": torch.inf}, "^length_exponent: "),
        (GSPOLoss, {"length_exponent": -1.0}, "^length_exponent: "),
        (GSPOTokenLoss, {"bound_below": "no"}, "^bound_below: "),
        (MultiScaleLoss, {"token_share": 1.1}, "^token_share: "),
    ],
)
def test_bad_option_of_one_loss_names_its_key(loss, options, key):
    with pytest.raises(InputError, match=key):
        loss(**options)


@each_loss
def test_arguments_are_spelt_out_and_keyword_only(name):
    parameters = inspect.signature(LOSSES[name][0]).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    assert {"clip_low", "clip_high", "aggregation", "kl_coef", "log_ratio_bound"} <= {
        p.name for p in parameters
    }
    assert all(p.annotation is not p.empty for p in parameters)


def test_document_means_of_a_document_without_labels_are_zero():
    inputs = LossInputs(
        document_index=torch.tensor([0, 0, 1]),
        loss_mask=torch.tensor([True, True, False]),
        old_logps=torch.zeros(3),
        advantages=torch.zeros(2),
        label_counts=torch.tensor([2, 0]),
    )
    assert document_means(torch.ones(3), inputs).tolist() == [1.0, 0.0]


TRAITS = {
    "gspo": (GSPOLoss, Axis.DOCUMENT),
    "grpo": (GRPOLoss, Axis.SLOT),
    "gspo_token": (GSPOTokenLoss, Axis.SLOT),
    "segment": (SegmentLoss, Axis.SEGMENT),
    "multi_scale": (MultiScaleLoss, Axis.SLOT),
    "cispo": (CISPOLoss, Axis.SLOT),
    "fspo": (FSPOLoss, Axis.DOCUMENT),
}


@pytest.mark.parametrize(("loss", "unit"), TRAITS.values(), ids=TRAITS)
def test_traits_tell_what_steers_the_code_around_a_loss(loss, unit):
    assert traits_of(loss()) == LossTraits(ratio_unit=unit)
    on = loss(kl_coef=0.1, entropy_coef=0.1, correction="sequence_product", clip_low=None)
    needs = {"kl_coef": "ref_logps", "correction": "sampler_logps", "entropy_coef": "entropies"}
    assert traits_of(on) == LossTraits(ratio_unit=unit, entropy_grad=True, needs=needs)
    assert not traits_of(loss(clip_low=None, clip_high=None)).has_clip_range


@pytest.mark.parametrize(("loss", "unit"), TRAITS.values(), ids=TRAITS)
@pytest.mark.parametrize("correction", ["token_tis", "token_mask"])
def test_corrections_of_tokens_need_a_term_per_token(loss, unit, correction):
    if unit == Axis.SLOT:
        loss(correction=correction)
        return
    message = f"^correction: '{correction}' weighs tokens, but the terms of .* are {unit}; set it"
    with pytest.raises(InputError, match=message):
        loss(correction=correction)
