import json
import math

import pytest
import torch

from gspo import metrics
from gspo.data.layout import pack_documents
from tests import tiny_policy


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", (5.0, 6.0)),
        ("sum", (5.0, 6.0)),
        ("time", (5.0, 6.0)),
        ("max", (4.0, 5.0)),
        ("min", (1.0, 5.0)),
    ],
)
def test_combine_follows_the_declared_reduction(how, expected):
    assert metrics.combine(how, (4.0, 5.0), (1.0, 1.0)) == expected


def test_every_metric_declares_a_known_reduction():
    assert {how for how, _, _ in metrics.METRICS.values()} == {"mean", "sum", "max", "min", "time"}
    assert all(per for _, per, _ in metrics.METRICS.values())


def test_undeclared_metric_is_a_mean():
    sums = metrics.StepMetrics()
    sums.add({"own/metric": (1.0, 1.0)})
    sums.add({"own/metric": (2.0, 3.0)})
    assert sums._how["own/metric"] == "mean"
    assert sums._pairs["own/metric"] == (3.0, 4.0)


def test_finalize_derives_what_sums_alone_do_not_give():
    ratios, rewards, log_ratios = (
        torch.tensor([0.5, 1.0, 3.0]),
        torch.tensor([0.0, 1.0, 1.0, 2.0]),
        torch.tensor([0.3, -0.4]),
    )
    values = {
        "ratio/mean": ratios.mean().item(),
        "_ratio_sq": ratios.square().mean().item(),
        "reward/mean": rewards.mean().item(),
        "_reward_sq": rewards.square().mean().item(),
        "_log_ratio_sq": log_ratios.square().mean().item(),
    }
    found = metrics.finalize(values)
    assert found["ratio/ess"] == pytest.approx(
        ratios.sum().item() ** 2 / ratios.square().sum().item() / 3
    )
    assert found["reward/std"] == pytest.approx(rewards.std(correction=0).item())
    assert found["log_ratio/rms_token"] == pytest.approx(math.sqrt(0.125))


@pytest.mark.parametrize(
    "values", [{}, {"ratio/mean": 0.0, "_ratio_sq": 0.0}], ids=["absent", "zero"]
)
def test_finalize_leaves_out_what_has_no_ingredients(values):
    assert metrics.finalize(values) == values


def test_equal_rewards_have_no_std():
    assert metrics.finalize({"reward/mean": 0.1, "_reward_sq": 0.1**2 - 1e-18})["reward/std"] == 0.0


def test_public_hides_ingredients_and_what_is_not_finite():
    assert metrics.public(
        {"loss": 1.0, "_places": 2.0, "kl_ref": math.nan, "ratio/max": -math.inf}
    ) == {"loss": 1.0}


def test_batch_pairs_count_real_documents_and_their_age():
    documents = tiny_policy.documents(5)
    batch = pack_documents(documents, 64)
    batch.policy_version[:5] = torch.tensor([3, 3, 2, 3, 0])
    pairs = {name: tuple(map(float, pair)) for name, pair in metrics.batch_pairs(batch, 4).items()}
    assert pairs["documents"] == (5, 1)
    assert pairs["tokens"] == (sum(len(d.logps) for d in documents), 1)
    assert pairs["_places"] == (batch.stats["packing_efficiency"][0], 1)
    assert pairs["staleness/mean"] == (1 + 1 + 2 + 1 + 4, 5)
    assert pairs["staleness/max"] == (4, 1)


def test_batch_pairs_of_padding_alone_count_nothing():
    pairs = metrics.batch_pairs(pack_documents([]), 4)
    assert {name: float(value) for name, (value, _) in pairs.items()} == dict.fromkeys(pairs, 0.0)
    assert float(pairs["staleness/mean"][1]) == 0


def test_a_segment_advantage_that_is_not_finite_names_its_document():
    batch = pack_documents(tiny_policy.documents(6), 128)
    batch.segment_index, batch.segment_advantages = batch.document_index, batch.advantages.clone()
    batch.segment_advantages[3] = torch.nan
    ((document, record),) = metrics.not_finite_documents(batch, batch.old_logps).items()
    assert document == 3 and set(record["token_advantages"]) == {"nan"}


@pytest.mark.parametrize("spoil", ["logps", "old_logps", "ref_logps"])
def test_not_finite_documents_are_named_with_their_values(spoil):
    documents = tiny_policy.documents(6)
    batch = pack_documents(documents, 128)
    logps = torch.full_like(batch.old_logps, -2.0)
    where = int((batch.loss_mask & (batch.document_index == 2)).nonzero()[0])
    outside = int((~batch.loss_mask).nonzero()[0])
    batch.ref_logps = batch.old_logps - 0.1
    (logps if spoil == "logps" else getattr(batch, spoil))[where] = -torch.inf
    logps[outside] = torch.nan  # not a label: no document's fault
    ((document, record),) = metrics.not_finite_documents(batch, logps).items()
    assert document == 2
    prompt_id, group_id = batch.ids[2]
    labels = batch.labels[(batch.document_index == 2) & batch.loss_mask].tolist()
    assert (record["prompt_id"], record["group_id"]) == (prompt_id, group_id)
    assert record["labels"] == [str(label) for label in labels]
    assert record[spoil][0] == "-inf" and len(record["logps"]) == len(record["old_logps"]) == len(
        labels
    )


def test_noise_floor_reads_what_is_there():
    assert metrics.noise_floor({"log_ratio/rms_token": 1e-6, "clip/any_document": 0.2}) == {
        "mismatch/rms_token": 1e-6,
        "clip/at_zero_drift": 0.2,
    }


def test_throughput_divides_places_by_seconds():
    values = {"_places": 500.0, "time/step": 2.0}
    assert metrics.throughput(values, 10, torch.device("cpu")) == {"tokens_per_second": 250.0}


def test_jsonl_grows_by_a_line_and_writes_null_for_what_json_lacks(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        metrics.append_jsonl(path, {"step": step, "loss": math.nan, "high": math.inf, "text": "ü"})
    first, second = path.read_text().splitlines()
    assert json.loads(first) == {"step": 1, "loss": None, "high": None, "text": "ü"}
    assert json.loads(second)["step"] == 2


def test_set_aside_keeps_every_earlier_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.set_aside(path)
    for run in ("first", "second"):
        path.write_text(run)
        metrics.set_aside(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.1.jsonl", "metrics.2.jsonl"]
    assert (tmp_path / "metrics.2.jsonl").read_text() == "second"


def test_merge_pairs_adds_means_and_takes_extremes():
    def pairs(value, weight):
        names = ("kl_new_old", "ratio/max", "ratio/min", "own")
        return {name: (torch.tensor(value), torch.tensor(weight)) for name in names}

    merged = metrics.merge_pairs([pairs(1.0, 2.0), pairs(3.0, 4.0)])
    found = {name: (float(value), float(weight)) for name, (value, weight) in merged.items()}
    assert found == {"kl_new_old": (4, 6), "ratio/max": (3, 2), "ratio/min": (1, 2), "own": (4, 6)}
    assert metrics.merge_pairs([]) == {}
