"""One update of the recipe is alike on all ranks.

The tests cover quarantined documents, skipped steps and random numbers.
"""

import math

import numpy as np
import pytest

from tests.distributed.launch import launch
from tests.recipes.runs import lines

LOSSES = ["gspo.losses.GSPOLoss", "gspo.losses.GRPOLoss"]


CONTEXT = "context_parallel_size=2"
CASES = {
    "gspo-1": (1, LOSSES[0]),
    "gspo-2": (2, LOSSES[0]),
    "grpo-1": (1, LOSSES[1]),
    "gspo-context": (2, LOSSES[0], CONTEXT),
    "grpo-context": (2, LOSSES[1], CONTEXT),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_quarantined_document_leaves_numerator_and_denominator(base, tmp_path, case):
    world_size, *options = case
    arguments = (str(base), str(tmp_path / "out"), *options)
    for found in launch("tests.recipes.updates:updates", world_size, tmp_path, *arguments):
        absent, spoiled = found["absent"], found["infinite_old_logps"]
        assert (absent["quarantined_documents"], spoiled["quarantined_documents"]) == (0, 1)
        assert spoiled["loss"] == pytest.approx(absent["loss"], rel=1e-6)
        assert (
            spoiled["grad_norm"] == pytest.approx(absent["grad_norm"], rel=1e-5)
            and absent["grad_norm"] > 0
        )
        for name, want in absent["grads"].items():
            error = np.linalg.norm(spoiled["grads"][name] - want) / np.linalg.norm(want)
            assert error < 1e-5 or name.endswith("k_proj.bias"), (
                f"{name}: {error:.1e}"
            )  # zero but for rounding
    records = [
        r
        for rank in range(world_size)
        for r in _read(tmp_path / "out" / f"quarantine_rank{rank}.jsonl")
    ]
    (record,) = records
    assert (record["prompt_id"], record["step"], record["stage"]) == ("p3", 1, "update")
    assert record["cause"] == "old_logps" and record["values"]["old_logps"][-1] == "inf"


def _read(path):
    return lines(path) if path.exists() else []


@pytest.mark.parametrize("case", [(1,), (2,), (2, CONTEXT)], ids=["1", "2", "context"])
def test_gradient_that_is_not_finite_skips_the_step_on_all_ranks(base, tmp_path, case):
    world_size, *options = case
    arguments = (str(base), str(tmp_path / "out"), *options)
    for found in launch("tests.recipes.updates:skipped", world_size, tmp_path, *arguments):
        assert math.isnan(found["nan"]) and found["quarantined"] >= 1 and found["same"]
        assert math.isfinite(found["good"])
        assert found["num_skipped"] == 3
        assert found["message"].startswith(
            "max_skipped_steps: 1 is exceeded: 2 steps in a row had a gradient norm that is not fi"
        )
        assert "; lower optimizer.lr" in found["message"]


def test_replicas_of_a_shard_draw_the_same_random_numbers(base, tmp_path):
    first, second = launch(
        "tests.recipes.updates:seeds", 2, tmp_path, str(base), str(tmp_path / "out")
    )
    replicas, shards = "data_parallel_replicate_size=2", ("data_parallel_replicate_size=1", CONTEXT)
    assert (
        first[replicas] == second[replicas]
    )  # stochastic rounding must not let the copies of a shard part
    for option in shards:
        assert len({*first[option], *second[option]}) == 4  # two shards, two steps
