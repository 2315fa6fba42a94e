"""What a run is told about its own settings."""

import logging
import math

import pytest
import torch

from gspo.diagnosis import Advisor, UpdateAudit

GOOD = {
    "lr": 1e-6, "grad_norm": 1.0, "update/changed_fraction": 0.5, "clip/at_zero_drift": 0.01, "clip/any_document": 0.1,
}  # fmt: skip


def warnings_of(caplog, *steps, has_band=True):
    advisor = Advisor(has_band=has_band)
    with caplog.at_level(logging.WARNING, logger="gspo.diagnosis"):
        for values in steps:
            advisor.look(GOOD | values)
    return [record.getMessage() for record in caplog.records]


def test_audit_counts_the_weights_that_a_step_moves():
    weights = [
        torch.nn.Parameter(torch.ones(300, 700)),
        torch.nn.Parameter(torch.ones(7)),
        torch.ones(5),
    ]
    audit = UpdateAudit(weights)
    audit.begin()
    with torch.no_grad():
        weights[0][:, ::2] += 1.0
        weights[1][2] = 0.0
    changed, total = audit.end()
    assert (
        total == 70_000 + 7
    )  # every third of the first, all of the second, and not what is not trained
    assert changed == 35_000 + 1


@pytest.mark.parametrize(("rate", "few"), [(1e-8, True), (1e-2, False)])
def test_audit_finds_bf16_updates_that_are_rounded_away(rate, few):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(0.02 * torch.randn(100, 100, dtype=torch.bfloat16))
    weight.grad = torch.randn(100, 100, dtype=torch.bfloat16)
    audit = UpdateAudit([weight])
    audit.begin()
    torch.optim.AdamW([weight], lr=rate).step()
    changed, total = audit.end()
    assert (changed < 0.01 * total) == few


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"update/changed_fraction": 0.004},
            ["changed 0.004 of the weights", "bf16_stochastic_round", "optimizer.lr"],
        ),
        ({"clip/at_zero_drift": 0.3}, ["0.3 of the documents", "loss.clip_low", "dtype"]),
    ],
    ids=["update", "noise"],
)
def test_each_cause_is_named_once_with_its_cure(caplog, values, words):
    (message,) = warnings_of(caplog, {}, values, {}, values)
    assert all(word in message for word in words)


def test_a_band_that_nothing_leaves_is_named(caplog):
    assert not warnings_of(
        caplog, *[{"clip/any_document": 0.0}] * 49, {}, *[{"clip/any_document": 0.0}] * 49
    )
    (message,) = warnings_of(caplog, *[{"clip/any_document": 0.0, "ratio/max": 1.0}] * 120)
    assert "for 50 steps" in message and "ppo_epochs, sync_every_steps" in message


def test_an_objective_without_a_band_and_steps_without_documents_are_no_cause(caplog):
    quiet, empty = {"clip/any_document": 0.0}, {"clip/any_document": math.nan}
    assert not warnings_of(caplog, *[quiet] * 60, has_band=False)
    assert not warnings_of(caplog, *[quiet] * 49, *[empty] * 60)
    assert warnings_of(caplog, *[quiet] * 49, empty, quiet)


@pytest.mark.parametrize(
    "values",
    [{"lr": 0.0}, {"grad_norm": 0.0}, {"grad_norm": math.inf}],
    ids=["warm-up", "no gradient", "skipped"],
)
def test_a_step_that_should_move_nothing_is_no_cause(caplog, values):
    assert not warnings_of(caplog, {"update/changed_fraction": 0.0} | values)
