"""What a run is told about its own settings."""

import logging
import math

import pytest
import torch
import torch.distributed as dist

from gspo.diagnosis import Advisor, UpdateAudit, log_document_weights
from gspo.losses import GSPOLoss
from gspo.losses.inputs import LossTraits
from gspo.metrics import Mean
from gspo.types import PackedBatch

GOOD = {
    "lr": 1e-6,
    "grad_norm": 1.0,
    "update/changed_fraction": 0.5,
    "clip/at_zero_drift": 0.01,
    "clip/any_document": 0.1,
}


class Loss:
    """Declares only whether a ratio can lie outside its clip range."""

    def __init__(self, has_clip_range=True):
        self.traits = LossTraits(has_clip_range=has_clip_range)


def warnings_of(caplog, *steps, has_clip_range=True, fresh=False, warns=True):
    advisor = Advisor(Loss(has_clip_range), warns=warns)
    with caplog.at_level(logging.WARNING, logger="gspo.diagnosis"):
        for values in steps:
            advisor.look(GOOD | values, fresh=fresh)
    return [record.getMessage() for record in caplog.records]


def test_audit_counts_the_weights_that_a_step_moves():
    weights = [
        torch.nn.Parameter(torch.ones(300, 700)),
        torch.nn.Parameter(torch.ones(7)),
        torch.ones(5),
    ]
    audit = UpdateAudit(weights)
    with audit, torch.no_grad():
        weights[0][:, ::2] += 1.0
        weights[1][2] = 0.0
    # Every third of the first, all of the second, and not what is not trained.
    expected = Mean(35_000 + 1, 70_000 + 7)
    assert audit.metrics() == {"update/changed_fraction": expected}
    with audit:
        pass
    assert audit.metrics() == {"update/changed_fraction": Mean(0, 70_000 + 7)}


@pytest.mark.parametrize(("rate", "few"), [(1e-8, True), (1e-2, False)])
def test_audit_finds_bf16_updates_that_are_rounded_away(rate, few):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(0.02 * torch.randn(100, 100, dtype=torch.bfloat16))
    weight.grad = torch.randn(100, 100, dtype=torch.bfloat16)
    audit = UpdateAudit([weight])
    with audit:
        torch.optim.AdamW([weight], lr=rate).step()
    assert (audit.metrics()["update/changed_fraction"].number() < 0.01) == few


def test_audit_of_a_step_that_fails_has_no_metrics():
    audit = UpdateAudit([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(KeyError), audit:
        raise KeyError
    assert audit.metrics() == {}


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


def test_a_clip_range_that_nothing_leaves_is_named(caplog):
    assert not warnings_of(
        caplog, *[{"clip/any_document": 0.0}] * 49, {}, *[{"clip/any_document": 0.0}] * 49
    )
    (message,) = warnings_of(caplog, *[{"clip/any_document": 0.0, "ratio/max": 1.0}] * 120)
    assert "for 50 steps" in message and "ppo_epochs, sync_every_steps" in message


def test_an_objective_without_a_clip_range_and_steps_without_documents_are_no_cause(caplog):
    quiet, empty = {"clip/any_document": 0.0}, {"clip/any_document": math.nan}
    assert not warnings_of(caplog, *[quiet] * 60, has_clip_range=False)
    assert not warnings_of(caplog, *[quiet] * 49, *[empty] * 60)
    assert warnings_of(caplog, *[quiet] * 49, empty, quiet)


@pytest.mark.parametrize(
    "values",
    [{"lr": 0.0}, {"grad_norm": 0.0}, {"grad_norm": math.inf}],
    ids=["warm-up", "no gradient", "skipped"],
)
def test_a_step_that_should_move_nothing_is_no_cause(caplog, values):
    assert not warnings_of(caplog, {"update/changed_fraction": 0.0} | values)


def test_noise_floor_is_read_off_a_fresh_step_and_warned_of(caplog):
    values = {"log_ratio/rms_token": 0.5, "log_ratio/abs_document": 0.25, "clip/any_document": 0.3}
    advisor = Advisor(Loss())
    with caplog.at_level(logging.WARNING, logger="gspo.diagnosis"):
        assert advisor.look(values, fresh=False) == {}
        assert not caplog.records
        assert advisor.look(values, fresh=True) == {
            "mismatch/rms_token": 0.5,
            "mismatch/abs_document": 0.25,
            "clip/at_zero_drift": 0.3,
        }
    (record,) = caplog.records
    assert "0.3 of the documents are outside the clip range" in record.getMessage()
    assert Advisor(Loss()).look({"loss": 1.0}, fresh=True) == {}


def test_a_rank_that_does_not_warn_derives_the_same(caplog):
    noisy = {"clip/any_document": 0.3}
    assert not warnings_of(caplog, noisy, fresh=True, warns=False)
    assert Advisor(Loss(), warns=False).look(noisy, fresh=True) == {"clip/at_zero_drift": 0.3}


def batch_of(*versions):
    """A batch of documents of these versions, before one of padding."""
    num_documents = len(versions) + 1
    slot, document = torch.zeros(1), torch.zeros(num_documents)
    counts = torch.tensor([*[1] * len(versions), 0])
    return PackedBatch(
        num_bins=1, tokens=slot, labels=slot, positions=slot, document_index=slot, loss_mask=slot,
        old_logps=slot, advantages=document, rewards=document, label_counts=counts,
        policy_version=torch.tensor([*versions, 0]), temperature=document, num_documents=0,
        num_label_tokens=0, ids=[("p", 0)] * len(versions),
    )  # fmt: skip


def test_documents_of_older_weights_are_named_once(caplog):
    silent, advisor = Advisor(Loss(), warns=False), Advisor(Loss())
    with caplog.at_level(logging.WARNING, logger="gspo.diagnosis"):
        silent.look_for_older(batch_of(3, 1), 3)
        advisor.look_for_older(batch_of(), 3)
        advisor.look_for_older(batch_of(3, 3), 3)
        assert not caplog.records
        for _ in range(2):
            advisor.look_for_older(batch_of(3, 1), 3)
    (record,) = caplog.records
    assert "of step 3, and documents came from those of step 1" in record.getMessage()


def told_weights(caplog, monkeypatch, loss, rank):
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    with caplog.at_level(logging.INFO, logger="torchtune.utils._logging"):
        log_document_weights(loss)
    return [record.getMessage() for record in caplog.records]


def test_document_weights_are_logged_on_the_first_rank(caplog, monkeypatch):
    loss = GSPOLoss(clip_low=0.2, clip_high=0.2, aggregation="document")
    assert not told_weights(caplog, monkeypatch, loss, rank=1)
    (message,) = told_weights(caplog, monkeypatch, loss, rank=0)
    assert message == (
        "In a step of documents of 8, 64, 256, 1024 tokens, each weighs 0.25, 0.25, 0.25, 0.25."
    )


def test_a_loss_whose_weights_cannot_be_found_is_no_error(caplog, monkeypatch):
    (message,) = told_weights(caplog, monkeypatch, Loss(), rank=0)
    assert "8, 64, 256, 1024 tokens weigh could not be found: TypeError" in message


IDLE = {"documents": 0.0, "dead_groups": 1.0}


@pytest.mark.parametrize(
    ("steps", "num_warnings"),
    [
        ([IDLE] * 60, 1),
        ([IDLE] * 19 + [{"documents": 8.0}] * 40 + [IDLE] * 19, 0),
        ([IDLE, IDLE, {"documents": 8.0}] * 20, 1),  # most of them, if not in a row
    ],
    ids=["in_a_row", "short", "most"],
)
def test_steps_without_documents_are_named_once(caplog, steps, num_warnings):
    messages = warnings_of(caplog, *steps)
    assert len(messages) == num_warnings
    for message in messages:
        assert "of the last" in message and "steps trained on no document" in message
        assert "dead_groups is 1" in message and "completions.jsonl" in message


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_reward_that_never_changes_is_named_once(caplog, reward):
    stuck, without = {"reward/mean": reward}, {}
    assert not warnings_of(caplog, *[stuck, without] * 39, {"reward/mean": 0.5}, *[stuck] * 39)
    (message,) = warnings_of(caplog, *[stuck, without] * 60)
    assert message.startswith(f"reward/mean has been {reward:g} in each of the last 40 steps")
    assert "completions.jsonl" in message and "reward_failures" in message


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("rewarded/truncated", "were cut before they ended"),
        ("rewarded/repeats_prompt", "repeat their prompt"),
        ("rewarded/same_text", "are one text for several prompts"),
    ],
)
def test_a_reward_that_rises_for_nothing_is_named_once(caplog, metric, words):
    rising = [{"reward/mean": 0.1 * step, metric: 0.75} for step in range(1, 11)]
    (warning,) = warnings_of(caplog, *rising)
    assert f"risen from 0.1 to 0.8, and 75 % of the rewarded completions {words}" in warning
    assert metric in warning and "docs/reward_hacking.md" in warning


@pytest.mark.parametrize(
    ("rewards", "share"),
    [([0.1, 0.2], 0.75), ([0.5] * 5 + [0.4] * 5, 0.75), (range(1, 11), 0.5), ([], 0.75)],
    ids=["few_steps", "no_rise", "small_share", "no_rewards"],
)
def test_shares_without_a_rise_are_no_cause(caplog, rewards, share):
    steps = [{"reward/mean": reward, "rewarded/same_text": share} for reward in rewards]
    assert warnings_of(caplog, *steps, {"rewarded/same_text": share}) == []


def test_quarantined_documents_are_logged_whenever_they_have_doubled(caplog):
    steps = [{"quarantined_documents": 0.0}, *[{"quarantined_documents": 3.0}] * 10]
    messages = warnings_of(caplog, *steps)
    counts = [message.split(":")[1].split(",")[0] for message in messages]
    assert counts == [" 3", " 6", " 12", " 24"]
    assert "quarantine_rank<r>.jsonl in output_dir" in messages[0]
