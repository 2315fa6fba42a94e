"""Both objectives against float64 restatements, in value and gradient, and the accounting beside them."""

from functools import partial

import pytest
import torch

from gspo.errors import InputError
from gspo.functional import LossInputs, document_means
from gspo.losses import GRPOLoss, GSPOLoss
from tests import objectives

LENGTHS = {"single": [7], "one_token": [1], "many": [1, 63, 5, 257, 12], "equal": [4, 4, 4]}
AGGREGATIONS = ["document", "token", "token_over_documents", "constant"]
BANDS = {"narrow": (3e-4, 4e-4), "wide": (0.2, 0.28)}
LOSSES = {"gspo": (GSPOLoss, objectives.gspo), "grpo": (GRPOLoss, objectives.grpo)}

each_loss = pytest.mark.parametrize("name", LOSSES)
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
each_band = pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)


def build(name, low, high, aggregation="document", **options):
    length = 100 if aggregation == "constant" else None
    return LOSSES[name][0](clip_low=low, clip_high=high, aggregation=aggregation, constant_length=length, **options)


def gradients(loss, documents):
    """The gradient of a loss on packed documents, document by document."""
    new, entropy, inputs = objectives.pack(documents)
    new.requires_grad_()
    value, metrics = loss(new, entropy, inputs)
    (grad,) = torch.autograd.grad(value, new)
    return value.detach(), list(grad.split([d["old"].numel() for d in documents] + [3])), metrics


def expected_gradients(restated, documents):
    for d in documents:
        d["new"] = d["new"].detach().requires_grad_()
    value = restated(documents) + 0 * sum(d["new"].sum() for d in documents)  # a graph, even if every term is clipped
    return value.detach(), torch.autograd.grad(value, [d["new"] for d in documents])


@each_loss
@each_lengths
@each_band
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_loss_equals_restatement(name, lengths, band, aggregation):
    documents = objectives.random_documents(lengths)
    value, grads, _ = gradients(build(name, *band, aggregation), documents)
    restated = partial(LOSSES[name][1], low=band[0], high=band[1], aggregation=aggregation)
    expected, expected_grads = expected_gradients(restated, documents)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(grads, expected_grads, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert grads[-1].eq(0).all()  # padding


@each_loss
def test_gradient_equals_finite_differences(name):
    new, entropy, inputs = objectives.pack(objectives.random_documents([3, 5], scale=0.05))
    loss = build(name, 0.2, 0.2, kl_coef=0.1, entropy_coef=0.1)
    assert torch.autograd.gradcheck(lambda x: loss(x, entropy, inputs)[0], new.requires_grad_())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gspo_gradient_at_ratio_one_equals_grpo(aggregation):
    documents = objectives.random_documents([1, 9, 30], scale=0.0)
    _, gspo, _ = gradients(build("gspo", 3e-4, 4e-4, aggregation), documents)
    _, grpo, _ = gradients(build("grpo", 0.2, 0.2, aggregation), documents)
    for a, b in zip(gspo, grpo, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert gspo[0].abs().sum() > 0


@each_loss
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
    assert metrics["clip/any_document"][0] == 1
    assert metrics["clip/binding_document"][0] == (0 if flows else 1)
    assert metrics["clip/binding_token"] == ((0 if flows else 6), 6)
    side = "clip/high" if shift > 0 else "clip/low"
    assert metrics[side][0] == (0 if flows else metrics[side][1])


def test_gspo_value_by_hand():
    # Two labels, log-ratios 0.1 and 0.3: s = exp(0.2) = 1.2214 is above 1.2, so a positive advantage is clipped at 1.2.
    inputs = LossInputs(
        document_index=torch.tensor([0, 0, 1]),
        loss_mask=torch.tensor([True, True, False]),
        old_logps=torch.tensor([-1.0, -2.0, 0.0]),
        advantages=torch.tensor([2.0, 0.0]),
        label_counts=torch.tensor([2, 0]),
    )
    logps = torch.tensor([-0.9, -1.7, 0.0])
    loss, metrics = GSPOLoss(clip_low=0.2, clip_high=0.2)(logps, torch.zeros(3), inputs)
    assert loss.item() == pytest.approx(-2.4)
    loss, _ = GSPOLoss(clip_low=0.2, clip_high=0.3)(logps, torch.zeros(3), inputs)
    assert loss.item() == pytest.approx(-2 * 2.718281828**0.2, rel=1e-6)
    assert metrics["ratio/mean"][0].item() == pytest.approx(1.221402758, rel=1e-6)


@each_loss
def test_values_outside_the_mask_do_not_matter(name):
    documents = objectives.random_documents([5, 8])
    loss = build(name, 0.2, 0.2, kl_coef=0.1)
    clean, clean_grads, _ = gradients(loss, documents)
    for d in documents:
        for key in ("new", "old", "ref", "entropy"):
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
    value, grads, _ = gradients(build(name, 0.2, 0.2), documents)
    expected, expected_grads = expected_gradients(partial(LOSSES[name][1], low=0.2, high=0.2), documents)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grads[0], expected_grads[0])


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
        return policy + objectives.penalties(documents, estimator=estimator, aggregation=aggregation, **knobs)

    expected, expected_grads = expected_gradients(restated, documents)
    torch.testing.assert_close(value, expected)
    for got, want in zip(grads, expected_grads, strict=False):
        torch.testing.assert_close(got, want)


def test_entropy_bonus_gradient_flows_to_the_entropy():
    _, entropy, inputs = objectives.pack(objectives.random_documents([4]))
    loss, _ = GSPOLoss(entropy_coef=0.5)(inputs.old_logps, entropy.requires_grad_(), inputs)
    (grad,) = torch.autograd.grad(loss, entropy)
    torch.testing.assert_close(grad, torch.where(inputs.loss_mask, -0.5 / 4, 0.0).double())


@each_loss
@pytest.mark.parametrize("poison", ["new", "old", "advantage"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=["nan", "inf"])
def test_document_that_is_not_finite_is_quarantined(name, poison, value):
    documents = objectives.random_documents([5, 8, 3])
    clean, clean_grads, _ = gradients(build(name, 0.2, 0.2), [documents[0], documents[2]])
    if poison == "advantage":
        documents[1]["advantage"] = torch.tensor(value, dtype=torch.float64)
    else:
        documents[1][poison][4] = value
    total, grads, metrics = gradients(build(name, 0.2, 0.2), documents)
    torch.testing.assert_close(total, clean)
    assert grads[1].eq(0).all()
    torch.testing.assert_close(grads[2], clean_grads[1])
    assert metrics["quarantined_documents"][0] == 1
    assert metrics["_late_tokens"][0] == 8
    assert all(pair[0].isfinite() for pair in metrics.values())


def test_bound_on_the_mean_log_ratio_is_counted():
    documents = objectives.random_documents([5, 5])
    documents[0]["new"] = documents[0]["old"] + 50.0
    documents[0]["advantage"] = torch.tensor(-1.0, dtype=torch.float64)
    value, grads, metrics = gradients(GSPOLoss(log_ratio_bound=2.0), documents)
    assert metrics["bounded_documents"][0] == 1
    assert metrics["ratio/max"][0].item() == pytest.approx(7.38905609893065)
    assert grads[0].eq(0).all()
    assert value.isfinite()


@each_loss
def test_metrics_do_not_disturb_the_loss(name):
    new, entropy, inputs = objectives.pack(objectives.random_documents([5, 8]))
    loss, metrics = build(name, 0.2, 0.2)(new.requires_grad_(), entropy, inputs)
    assert all(not value.requires_grad and not weight.requires_grad for value, weight in metrics.values())
    before = torch.autograd.grad(loss, new, retain_graph=True)[0]
    sum(value for value, _ in metrics.values())
    assert torch.equal(before, torch.autograd.grad(loss, new)[0])


@each_loss
def test_metrics_by_hand(name):
    documents = objectives.random_documents([2, 4])
    documents[0]["new"] = documents[0]["old"] + 0.1
    documents[1]["new"] = documents[1]["old"] - 0.2
    _, _, metrics = gradients(build(name, 0.15, 0.15), documents)
    k3 = 2 * (torch.e**0.1 - 1 - 0.1) + 4 * (torch.e**-0.2 - 1 + 0.2)
    assert metrics["kl_new_old"][0].item() == pytest.approx(k3)
    assert metrics["kl_new_old"][1] == 2
    assert metrics["log_ratio/abs_document"][0].item() == pytest.approx(0.3)
    assert metrics["_log_ratio_sq"][0].item() == pytest.approx(2 * 0.01 + 4 * 0.04)
    assert metrics["clip/any_document"] == (1, 2)


@each_loss
def test_compiled_form_agrees(name):
    new, entropy, inputs = objectives.pack(objectives.random_documents([5, 8, 1]))
    loss = build(name, 0.2, 0.2, kl_coef=0.1, entropy_coef=0.1)
    compiled = torch.compile(loss)
    values = []
    for form in (loss, compiled):
        leaf = new.detach().clone().requires_grad_()
        value, metrics = form(leaf, entropy, inputs)
        values.append((value.detach(), torch.autograd.grad(value, leaf)[0], {k: v[0] for k, v in metrics.items()}))
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "by_documents", "expected"),
    [("document", False, 7), ("token", False, 50), ("token", True, 7), ("token_over_documents", False, 7)],
)
def test_denominator_is_the_steps_total(aggregation, by_documents, expected):
    loss = GSPOLoss(aggregation=aggregation, normalize_by_documents=by_documents)
    assert loss.denominator(7, 50) == expected


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
        ({"clip_low": -0.1}, "loss.clip_low"),
        ({"clip_low": 1.5}, "loss.clip_low"),
        ({"clip_high": -0.1}, "loss.clip_high"),
        ({"aggregation": "mean"}, "loss.aggregation"),
        ({"aggregation": "constant"}, "loss.constant_length"),
        ({"kl_estimator": "k4"}, "loss.kl_estimator"),
        ({"log_ratio_bound": 0.0}, "loss.log_ratio_bound"),
        ({"aggregation": "constant", "constant_length": 9, "normalize_by_documents": True}, "normalize_by_documents"),
    ],
)
@each_loss
def test_bad_option_names_its_key(name, options, key):
    with pytest.raises(InputError, match=key):
        LOSSES[name][0](**options)


def test_document_means_of_a_document_without_labels_are_zero():
    inputs = LossInputs(
        document_index=torch.tensor([0, 0, 1]),
        loss_mask=torch.tensor([True, True, False]),
        old_logps=torch.zeros(3),
        advantages=torch.zeros(2),
        label_counts=torch.tensor([2, 0]),
    )
    assert document_means(torch.ones(3), inputs).tolist() == [1.0, 0.0]
