"""Corrections of the sampler's mismatch, against float64 restatements, token by token."""

import math
from dataclasses import replace

import pytest
import torch

from gspo.errors import InputError
from gspo.losses import GRPOLoss, GSPOLoss, GSPOTokenLoss
from gspo.metrics import METRICS, NotFinite, finalize
from tests.losses import objectives

LOW, HIGH = 0.8, 1.25
NAMES = ("token_tis", "token_mask", "sequence_product", "sequence_geometric")


def documents_of(lengths, seed=0):
    """Documents with log-probabilities of a sampler that is off by some 0.3 nats a token."""
    documents = objectives.random_documents(lengths, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for d in documents:
        d["sampler"] = d["old"] + 0.3 * torch.randn(
            d["old"].numel(), generator=generator, dtype=torch.float64
        )
    return documents


def weights_of(document, name):
    """The weight of each labelled token of a document."""
    ratios = [
        math.exp(m) for m in (document["old"] - document["sampler"])[document["mask"]].tolist()
    ]
    if name == "token_tis":
        return [min(r, HIGH) for r in ratios]
    if name == "token_mask":
        return [r if LOW <= r <= HIGH else 0.0 for r in ratios]
    whole = (
        math.prod(ratios) if name == "sequence_product" else math.prod(ratios) ** (1 / len(ratios))
    )
    return [min(whole, HIGH)] * len(ratios)


def restated(documents, name, ratio):
    """The undivided sum of clipped terms, each times its weight; every document weighs 1."""
    total = 0.0
    for d in documents:
        weights, log_ratios = weights_of(d, name), (d["new"] - d["old"])[d["mask"]]
        if ratio == "document":
            term = objectives.clipped(log_ratios.mean().exp(), d["advantage"], 0.2, 0.2)
            total = total + weights[0] * term
        else:
            terms = [objectives.clipped(x.exp(), d["advantage"], 0.2, 0.2) for x in log_ratios]
            total = total + sum(w * t for w, t in zip(weights, terms, strict=True)) / len(weights)
    return total


def packed(documents):
    new, entropy, inputs = objectives.pack(documents)
    sampler = torch.cat([d["sampler"] for d in documents] + [torch.zeros(3, dtype=torch.float64)])
    return new, entropy, replace(inputs, ref_logps=None, sampler_logps=sampler)


@pytest.mark.parametrize(
    ("build", "ratio", "name"),
    [(GRPOLoss, "token", name) for name in NAMES]
    + [(GSPOLoss, "document", name) for name in NAMES[2:]],
)
def test_correction_equals_restatement(build, ratio, name):
    documents = documents_of([1, 7, 33, 4])
    options = {"correction": name, "correction_low": LOW, "correction_high": HIGH}
    loss = build(clip_low=0.2, clip_high=0.2, **options)
    new, entropy, inputs = packed(documents)
    new.requires_grad_()
    value, metrics, _ = loss(new, entropy, inputs)
    (grad,) = torch.autograd.grad(value, new)
    for d in documents:
        d["new"] = d["new"].detach().requires_grad_()
    expected = restated(documents, name, ratio) + 0 * sum(
        d["new"].sum() for d in documents
    )  # clipped ones have none
    expected_grads = torch.autograd.grad(expected, [d["new"] for d in documents])
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad[:-3], torch.cat(expected_grads), rtol=1e-10, atol=1e-14)
    assert 0 < metrics["correction/changed"].value < metrics["correction/changed"].weight


def test_metrics_are_of_before_and_after():
    documents = documents_of([5, 12])
    loss = GRPOLoss(correction="token_mask", correction_low=LOW, correction_high=HIGH)
    metrics = loss(*packed(documents)).metrics
    ratios = torch.cat([(d["old"] - d["sampler"])[d["mask"]] for d in documents]).exp()
    kept = (ratios >= LOW) & (ratios <= HIGH)
    numbers = finalize({name: metric.number() for name, metric in metrics.items()})
    assert numbers["correction/ratio_mean"] == pytest.approx(float(ratios.mean()))
    assert numbers["correction/ratio_max"] == pytest.approx(float(ratios.max()))
    assert numbers["correction/weight_mean"] == pytest.approx(float((ratios * kept).mean()))
    assert numbers["correction/changed"] == pytest.approx(float((~kept).double().mean()))
    for name, values in (("ratio", ratios), ("weight", ratios * kept)):
        share = float(values.sum() ** 2 / values.square().sum() / values.numel())
        assert numbers[f"correction/{name}_ess"] == pytest.approx(share)
    assert numbers["mismatch/rms_token"] == pytest.approx(
        float(ratios.log().square().mean().sqrt())
    )
    means = [(d["old"] - d["sampler"])[d["mask"]].mean().abs() for d in documents]
    assert numbers["mismatch/abs_document"] == pytest.approx(float(sum(means) / 2))


def test_without_a_mismatch_no_correction_changes_anything():
    new, entropy, inputs = packed(documents_of([5, 12]))
    same = replace(inputs, sampler_logps=inputs.old_logps)
    plain, *_ = GSPOTokenLoss()(new, entropy, replace(inputs, sampler_logps=None))
    for name in NAMES:
        assert GSPOTokenLoss(correction=name)(new, entropy, same)[0] == plain


def test_a_sampler_value_that_is_not_finite_quarantines_its_document():
    new, entropy, inputs = packed(documents_of([5, 12]))
    inputs.sampler_logps[4] = torch.nan
    value, metrics, not_finite = GRPOLoss(correction="token_tis")(new, entropy, inputs)
    assert value.isfinite() and metrics["quarantined_documents"].value == 1
    assert not_finite == NotFinite(1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"correction": "tis"},
            "correction: 'tis' must be one of token_tis, token_mask",
        ),
        (
            {"correction": "token_tis"},
            "correction: 'token_tis' weighs tokens, but the terms of GSPOLoss are documents; set",
        ),
        (
            {"correction": "sequence_product", "correction_high": 0.5},
            "correction_high: 0.5 must be 1 or more",
        ),
        (
            {"correction": "sequence_product", "correction_low": 2.0},
            "correction_low: 2.0 must lie in",
        ),
    ],
    ids=["unknown", "of_tokens", "high", "low"],
)
def test_bad_correction_names_its_key(options, message):
    with pytest.raises(InputError) as error:
        GSPOLoss(**options)
    assert str(error.value).startswith(message)


def test_metrics_of_corrections_are_declared():
    metrics = GRPOLoss(correction="token_mask")(*packed(documents_of([5]))).metrics
    names = {name for name in metrics if "correction" in name or "mismatch" in name}
    ingredients = {"_mismatch_sq", "_correction_ratio_sq", "_correction_weight_sq"}
    assert names - ingredients <= METRICS.keys()
