"""Tests the parts of an optimizer step by themselves.

tests/distributed compares gradients over all arrangements.
"""

import math

import pytest
import torch

from gspo import update
from gspo.data.layout import pack_documents
from gspo.errors import DataError, InputError
from gspo.losses.checked import CheckedLoss
from gspo.losses.inputs import LossOutput
from gspo.metrics import Mean, NotFinite, Sum
from tests import tiny_policy
from tests.recipes.own_loss import OwnLoss


def test_a_segment_advantage_that_is_not_finite_names_its_document():
    batch = pack_documents(tiny_policy.documents(6), 128)
    batch.segment_index, batch.segment_advantages = batch.document_index, batch.advantages.clone()
    batch.segment_advantages[3] = torch.nan
    ((number, document),) = update.not_finite_documents(batch, batch.old_logps).items()
    assert number == 3 and set(document.values["token_advantages"]) == {"nan"}
    assert document.cause == "token_advantages"


OF_THE_RECIPE = [
    *("step", "loss", "reward/mean", "reward/own", "documents", "staleness/max", "dead_groups"),
    *("_slots", "time/step", "eval/pass@k", "quarantined_documents", "lr", "tokens_per_second"),
]


@pytest.mark.parametrize("name", OF_THE_RECIPE)
def test_a_loss_gives_no_metric_of_the_recipes_own(name):
    output = LossOutput(torch.zeros(()), {name: (99, 1)})
    with pytest.raises(InputError, match=f"^loss: 'OwnLoss' gives a metric named '{name}'"):
        update._own_metrics(CheckedLoss(OwnLoss()), output)


def test_a_loss_gives_the_metrics_of_the_shipped_ones_and_its_own():
    """The count of documents that were taken out is the recipe's, whatever the loss says."""
    names = [
        "ratio/ess",
        "clip/any_document",
        "kl_ref",
        "entropy",
        "own/x",
        "quarantined_documents",
    ]
    metrics = dict.fromkeys(names, Mean(1, 1))
    output = LossOutput(torch.zeros(()), metrics, NotFinite(3, 7))
    assert update._own_metrics(OwnLoss(), output) == {**metrics, "quarantined_documents": Sum(3)}


@pytest.mark.parametrize("spoil", ["logps", "old_logps", "ref_logps"])
def test_not_finite_documents_are_named_with_their_values(spoil):
    batch = pack_documents(tiny_policy.documents(6), 128)
    logps = torch.full_like(batch.old_logps, -2.0)
    where = int((batch.loss_mask & (batch.document_index == 2)).nonzero()[0])
    outside = int((~batch.loss_mask).nonzero()[0])
    batch.ref_logps = batch.old_logps - 0.1
    (logps if spoil == "logps" else getattr(batch, spoil))[where] = -torch.inf
    logps[outside] = torch.nan  # not a label: no document's fault
    ((number, document),) = update.not_finite_documents(batch, logps).items()
    assert number == 2 and document.cause == spoil
    labels = batch.labels[(batch.document_index == 2) & batch.loss_mask].tolist()
    assert (document.prompt_id, document.group_id) == batch.ids[2]
    assert document.tokens == labels
    values = document.values
    assert values[spoil][0] == "-inf"
    assert len(values["logps"]) == len(values["old_logps"]) == len(labels)


@pytest.mark.parametrize("norm", [1.0, math.inf, math.nan])
def test_a_step_is_made_of_finite_gradients_alone(norm):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    moved = update.step_if_finite(torch.optim.SGD([weight], lr=0.5), norm)
    assert moved == math.isfinite(norm) and weight.grad is None
    assert weight.tolist() == [0.5 if moved else 1.0] * 3


def test_a_version_from_the_future_is_refused_with_its_prompt():
    batch = pack_documents(tiny_policy.documents(6), 128)
    batch.policy_version[:6] = torch.tensor([3, 1, 2, 3, 0, 3])
    update.check_versions(batch, 3)
    batch.policy_version[2] = 99
    prompt_id, _ = batch.ids[2]
    with pytest.raises(DataError) as refused:
        update.check_versions(batch, 3)
    assert str(refused.value).startswith(
        f"a completion of prompt {prompt_id}: policy_version is 99, needed: at most 3"
    )
