"""One gradient, whatever the arrangement: bins, order, microbatches, ranks, compiled or not."""

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from tests import tiny_policy
from tests.distributed.arrangements import ARRANGEMENTS, LOSSES
from tests.distributed.launch import once_per_world_size
from tests.losses import objectives

SPLIT = [n for n in ARRANGEMENTS if ARRANGEMENTS[n].keys() & {"context", "replicate"}]
WORLD_SIZES = {
    1: [n for n in ARRANGEMENTS if n not in SPLIT],
    2: [n for n in ARRANGEMENTS if n not in SPLIT and not ARRANGEMENTS[n].get("compile_layers")]
    + [
        n
        for n in SPLIT
        if ARRANGEMENTS[n].get("context") == 2 and "replicate" not in ARRANGEMENTS[n]
    ],
    4: [
        "one_bin",
        "five_microbatches",
        *(n for n in SPLIT if not ARRANGEMENTS[n].get("compile_layers")),
    ],
}
CASES = [(world, name) for world, names in WORLD_SIZES.items() for name in names]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All gradients of a world size, computed once by real processes."""
    target = "tests.distributed.arrangements:all_gradients"
    of_ranks = once_per_world_size(
        tmp_path_factory, target, lambda world_size: (WORLD_SIZES[world_size],)
    )
    return lambda world_size: of_ranks(world_size)[0]


def document_by_document(loss_name, *, tied):
    """Computes loss and gradients with a plain decoder, one document at a time.

    It uses all logits and a restated loss.
    """
    decoder = tiny_policy.build_decoder(tied=tied)
    decoder.load_state_dict(tiny_policy.weights(tied=tied))
    documents = tiny_policy.documents()
    restated = []
    for d in documents:
        tokens = torch.tensor(d.tokens)
        logps = log_softmax(decoder(tokens[None, :-1])[0].double() / d.temperature, -1)
        new = logps.gather(-1, tokens[1:, None]).squeeze(-1)
        mask = torch.arange(1, len(d.tokens)) >= d.num_prompt_tokens
        old = torch.zeros(len(d.tokens) - 1, dtype=torch.float64)
        old[mask] = torch.tensor(d.logps, dtype=torch.float32).double()
        restated.append(
            {"new": new, "old": old, "mask": mask, "advantage": torch.tensor(d.advantage)}
        )
    value = getattr(objectives, loss_name)(restated, low=0.2, high=0.2) / len(documents)
    value.backward()
    return value.item(), {name: p.grad.numpy() for name, p in decoder.named_parameters()}


@pytest.fixture(scope="module")
def expected():
    return {
        (loss, tied): document_by_document(loss, tied=tied)
        for loss in LOSSES
        for tied in (True, False)
    }


@pytest.mark.parametrize(("world_size", "name"), CASES, ids=[f"{n}-{w}" for w, n in CASES])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_the_same(found, expected, world_size, name, loss):
    metrics, grads = found(world_size)[name, loss]
    value, expected_grads = expected[loss, ARRANGEMENTS[name].get("tied", True)]
    assert metrics["loss"] == pytest.approx(value, rel=1e-5)
    assert 0 < metrics["clip/binding_token"] < 1  # both sides of the clip are exercised
    assert grads.keys() == expected_grads.keys()
    for parameter, want in expected_grads.items():
        error = np.linalg.norm(grads[parameter] - want) / np.linalg.norm(want)
        assert error < 1e-5, f"{parameter}: {error:.1e}"


# Those of other temperatures, weights or documents apart.
SAME_METRICS = [
    (world, name)
    for world, name in CASES
    if world > 1 and ARRANGEMENTS[name].get("tied", True) and name != "shuffled"
]


@pytest.mark.parametrize(
    ("world_size", "name"), SAME_METRICS, ids=[f"{n}-{w}" for w, n in SAME_METRICS]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_metrics_do_not_depend_on_the_ranks(found, world_size, name, loss):
    one, _ = found(1)["five_microbatches", loss]
    several, _ = found(world_size)[name, loss]
    assert one.keys() == several.keys()
    for metric, value in one.items():
        assert several[metric] == pytest.approx(value, rel=1e-5, abs=1e-7, nan_ok=True), metric
