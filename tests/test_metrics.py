import math

import pytest
import torch

from gspo import metrics
from gspo.data.layout import pack_documents
from tests import tiny_policy


@pytest.mark.parametrize(
    ("reduction", "on_a_rank", "over_ranks"),
    [
        (metrics.Mean, (5.0, 6.0), (5.0, 6.0)),
        (metrics.Sum, (5.0, 6.0), (5.0, 6.0)),
        (metrics.Time, (5.0, 6.0), (4.0, 5.0)),
        (metrics.Max, (4.0, 5.0), (4.0, 5.0)),
        (metrics.Min, (1.0, 5.0), (1.0, 5.0)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("as_tensors", [False, True])
def test_a_value_carries_its_reduction(reduction, on_a_rank, over_ranks, as_tensors):
    make = torch.tensor if as_tensors else float
    one, other = (reduction(make(v), make(w)) for v, w in ((4.0, 5.0), (1.0, 1.0)))
    together = one + other
    assert type(together) is reduction
    assert (float(together.value), float(together.weight)) == on_a_rank
    together = one.over_ranks(other)
    assert (float(together.value), float(together.weight)) == over_ranks


def test_every_described_metric_says_what_it_is_per():
    assert all(description.per for description in metrics.METRICS.values())


def test_a_plain_pair_is_a_mean():
    sums = metrics.StepMetrics()
    sums.add({"own/metric": (1.0, 1.0)})
    sums.add({"own/metric": (torch.tensor(2.0), 3)})
    assert sums.alone() == {"own/metric": 0.75}


def test_step_metrics_count_what_is_not_finite():
    sums = metrics.StepMetrics([{"loss": metrics.Sum(1.0)}])
    sums.add({}, metrics.NotFinite(torch.tensor(1), torch.tensor(7)))
    sums.add({"loss": metrics.Sum(torch.tensor(2.0))}, metrics.NotFinite(2, 5))
    assert sums.alone() == {"loss": 3.0}
    assert sums.not_finite == (3, 12)


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


def test_huge_rewards_have_no_std_instead_of_an_overflow():
    numbers = metrics.finalize({"_reward_sq": math.inf, "reward/mean": 1e308})
    assert "reward/std" not in metrics.public(numbers)


def test_public_hides_ingredients_and_what_is_not_finite():
    assert metrics.public(
        {"loss": 1.0, "_slots": 2.0, "kl_ref": math.nan, "ratio/max": -math.inf}
    ) == {"loss": 1.0}


def numbers(parts):
    return {name: (float(part.value), float(part.weight)) for name, part in parts.items()}


def test_batch_metrics_count_real_documents_and_their_age():
    documents = tiny_policy.documents(5)
    batch = pack_documents(documents, 64)
    batch.policy_version[:5] = torch.tensor([3, 3, 2, 3, 0])
    counts = numbers(metrics.batch_metrics(batch, 4))
    assert counts["documents"] == (5, 1)
    assert counts["tokens"] == (sum(len(d.logps) for d in documents), 1)
    assert counts["_slots"] == (batch.stats["packing_efficiency"].value, 1)
    assert counts["staleness/mean"] == (1 + 1 + 2 + 1 + 4, 5)
    assert counts["staleness/max"] == (4, 1)


def test_batch_metrics_of_padding_alone_count_nothing():
    counts = numbers(metrics.batch_metrics(pack_documents([]), 4))
    assert {name: value for name, (value, _) in counts.items()} == dict.fromkeys(counts, 0.0)
    assert counts["staleness/mean"][1] == 0


def test_merge_adds_means_and_takes_extremes():
    def part(value, weight):
        pair = torch.tensor(value), torch.tensor(weight)
        kinds = {"kl_new_old": metrics.Mean, "ratio/max": metrics.Max, "ratio/min": metrics.Min}
        return {name: kind(*pair) for name, kind in kinds.items()}

    merged = numbers(metrics.merge([part(1.0, 2.0), part(3.0, 4.0)]))
    assert merged == {"kl_new_old": (4, 6), "ratio/max": (3, 2), "ratio/min": (1, 2)}
    assert metrics.merge([]) == {}
    assert metrics.merge([{"own": (1.0, 2.0)}, {"own": (3.0, 4.0)}]) == {"own": metrics.Mean(4, 6)}
