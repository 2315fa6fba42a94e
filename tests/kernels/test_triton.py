"""The Triton backend against float64, on a GPU or through Triton's interpreter on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is there on Linux only")

from gspo.kernels import head, linear_logps, linear_loss, logits_logps, rows  # noqa: E402
from gspo.kernels import triton as backend  # noqa: E402
from tests.kernels import heads  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative error of a gradient by its dtype: half a unit in the last place, or one from the
# interpreter, which cuts off.
UNITS = 0.5 if DEVICE == "cuda" else 1.0
ERRORS = {torch.float32: 1e-5, torch.float16: UNITS * 2**-10, torch.bfloat16: UNITS * 2**-7}
SIZES = {"one": (1, 3, 2), "odd": (13, 16, 61), "prime_vocabulary": (21, 24, 1187)}
COUNTS = [1, 9, 0, 1, 4, 1, 5]  # documents of 21 rows
pytestmark = pytest.mark.filterwarnings(
    "ignore:All-NaN slice"
)  # the interpreter's maximum is numpy's
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a short row."""
    monkeypatch.setattr(backend, "BLOCK", 256)


def surrounded_logits(vocab_size, dtype, num_rows=6):
    """Return rows apart in memory of nan, their labels and temperatures.

    All logits are negative; three rows have -inf before or after their label.
    """
    generator = torch.Generator().manual_seed(vocab_size)
    memory = torch.full((num_rows + 2, vocab_size + 19), torch.nan, dtype=dtype, device=DEVICE)
    logits = memory[1:-1, :vocab_size]
    logits.copy_(3 * torch.randn(num_rows, vocab_size, generator=generator) - 50)
    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    for row, label in enumerate(labels[:3].tolist()):
        logits[row, : (label, 0, label // 2)[row]] = -torch.inf
        logits[row, (label + 1, vocab_size, label + 1)[row] :] = -torch.inf
    temperature = 0.5 + torch.rand(num_rows, generator=generator)
    return memory, logits, labels.to(DEVICE), temperature.to(DEVICE)


def restated(logits, labels, temperature):
    return heads.restated_logits(logits.double().clamp(min=-1e5), labels, temperature)


@pytest.mark.parametrize("vocab_size", [1, 2, 61, 255, 256, 1187])
@pytest.mark.parametrize("dtype", list(ERRORS), ids=str)
def test_statistics_equal_float64(vocab_size, dtype):
    _, logits, labels, temperature = surrounded_logits(vocab_size, dtype)
    found = backend.statistics(logits, labels, temperature)
    logps, entropy = restated(logits, labels, temperature)
    expected = logps, (logits.double() / temperature.double()[:, None]).logsumexp(-1), entropy
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [(x, x) for x in ERRORS] + [(torch.float32, x) for x in ERRORS if x.itemsize == 2],
    ids=str,
)
@pytest.mark.parametrize("with_entropy", [False, True], ids=["plain", "entropy"])
@pytest.mark.parametrize("vocab_size", [61, 1187])
def test_gradient_in_place_equals_float64(wide, narrow, with_entropy, vocab_size):
    memory, logits, labels, temperature = surrounded_logits(vocab_size, wide)
    weights = heads.mix_weights(6, zeros=0).to(DEVICE) * torch.tensor(
        [[1.0], [float(with_entropy)]], device=DEVICE
    )
    weights[:, 4] = 0
    leaf = logits.detach().double().requires_grad_()
    outputs = restated(leaf, labels, temperature)
    (expected,) = torch.autograd.grad(heads.mixed(*outputs, weights), leaf)
    log_z = (leaf.detach() / temperature[:, None]).logsumexp(-1)
    logits[4] = torch.nan
    d_logps, d_entropy = weights.float()
    found = backend.gradient(
        logits,
        labels,
        temperature,
        log_z.float(),
        outputs[1].detach().float(),
        d_logps,
        d_entropy if with_entropy else None,
        narrow,
    )
    assert found.dtype == narrow and found.data_ptr() == logits.data_ptr()
    assert (found[4] == 0).all()
    for row in (1, 2, 3, 5):
        assert heads.relative(found[row], expected[row]) < max(ERRORS[wide], ERRORS[narrow])
    assert (
        found[0].double() - expected[0]
    ).abs().max() < 1e-5  # all but the label is -inf: the gradient is 0
    memory[1:-1, :vocab_size] = torch.nan
    assert memory.isnan().all()


def on_device(size, *, dtype=torch.float32, scale=1.0):
    return tuple(x.to(DEVICE) for x in heads.inputs(size, dtype=dtype, scale=scale))


@each_size
@each_dtype
@pytest.mark.parametrize("chunk_size", [4096, 8])
def test_linear_logps_equals_float64(size, dtype, chunk_size):
    values, weights = on_device(size, dtype=dtype), heads.mix_weights(size[0], zeros=0.3).to(DEVICE)
    options = {"chunk_size": chunk_size, "entropy_grad": True, "kernel": "triton"}
    logps, entropy, *found = heads.gradients(
        lambda *x: linear_logps(*x, **options), weights, *values
    )
    expected_logps, expected_entropy, *expected = heads.gradients(heads.restated, weights, *values)
    torch.testing.assert_close(logps.double(), expected_logps, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-6, atol=1e-5)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert heads.relative(got, want) < 2 * ERRORS[dtype]


@each_size
@each_dtype
def test_logits_logps_equals_float64(size, dtype):
    hidden, weight, labels, temperature = on_device(size)
    logits, weights = (
        (hidden @ weight.T).to(dtype),
        heads.mix_weights(size[0], zeros=0.3).to(DEVICE),
    )
    logits.masked_fill_(weights.any(0).logical_not()[:, None], torch.nan)  # rows without a gradient
    found = heads.gradients(
        lambda *x: logits_logps(*x, entropy_grad=True, kernel="triton"),
        weights,
        logits,
        labels,
        temperature,
    )
    expected = heads.gradients(heads.restated_logits, weights, logits, labels, temperature)
    active = weights.any(0)
    for got, want in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(got[active].double(), want[active], rtol=1e-6, atol=5e-6)
    assert found[2].dtype == dtype and (found[2][~active] == 0).all()
    assert not active.any() or heads.relative(found[2][active], expected[2][active]) < ERRORS[dtype]


def loss_case(*, entropy_coef=0.0, dtype=torch.float32):
    values = on_device(SIZES["prime_vocabulary"], dtype=dtype, scale=0.3)
    generator = torch.Generator().manual_seed(1)
    old = heads.restated(*values)[0] + torch.randn(sum(COUNTS), generator=generator).to(DEVICE)
    advantages = torch.tensor([1.0, -1.0, 2.0, 0.0, -2.0, 0.5, 0.0], device=DEVICE)
    return values, COUNTS, heads.sequence_loss(old, advantages, COUNTS, entropy_coef)


@each_dtype
@pytest.mark.parametrize("chunk_size", [4096, 8, 1], ids=lambda n: f"chunks_of_{n}")
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1], ids=["plain", "entropy_bonus"])
def test_linear_loss_equals_float64(dtype, chunk_size, entropy_coef):
    case = loss_case(entropy_coef=entropy_coef, dtype=dtype)
    options = {"kernel": "triton", "chunk_size": chunk_size, "entropy_grad": entropy_coef > 0}
    loss, clipped, *found = heads.loss_and_gradients(*case, **options)
    expected_loss, expected_clipped, *expected = heads.restated_loss(*case)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert clipped == expected_clipped
    for got, want in zip(found, expected, strict=True):
        assert heads.relative(got, want) < ERRORS[dtype]
    dead = (expected[0] == 0).all(-1)
    assert dead.any() == (entropy_coef == 0) and (found[0][dead] == 0).all()


def test_no_rows_give_no_gradient():
    hidden, weight, labels, temperature = on_device((3, 4, 9))
    hidden, weight, labels, temperature = (
        hidden[:0].requires_grad_(),
        weight.requires_grad_(),
        labels[:0],
        temperature[:0],
    )
    logits = torch.zeros(0, 9, device=DEVICE, requires_grad=True)
    parts = (
        *linear_logps(hidden, weight, labels, temperature, entropy_grad=True, kernel="triton"),
        *logits_logps(logits * 1, labels, temperature, entropy_grad=True, kernel="triton"),
        linear_loss(
            hidden,
            weight,
            labels,
            temperature,
            [0, 0],
            lambda logps, *_: (logps.sum(), None),
            kernel="triton",
        )[0],
    )
    assert [x.shape for x in parts] == [(0,)] * 4 + [()]
    sum(x.sum() for x in parts).backward()
    assert hidden.grad.shape == (0, 4) and logits.grad.shape == (0, 9) and (weight.grad == 0).all()


@each_dtype
def test_two_runs_and_unwritten_memory_give_the_same_bits(dtype, monkeypatch):
    case = loss_case(entropy_coef=0.1, dtype=dtype)
    options = {"kernel": "triton", "chunk_size": 8, "entropy_grad": True}
    plain = heads.loss_and_gradients(*case, **options)
    taken = []
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **settings):
        memory = new_empty(*args, **settings)
        taken.append(memory.is_floating_point() and memory.numel())
        return memory.fill_(torch.nan) if taken[-1] else memory

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    again = heads.loss_and_gradients(*case, **options)
    assert 8 * (1187 + head._ROW_GAP) in taken and again[:2] == plain[:2]
    assert all(torch.equal(a, b) for a, b in zip(again[2:], plain[2:], strict=True))


def test_a_nan_reaches_its_own_row_only():
    _, logits, labels, temperature = surrounded_logits(1187, torch.float32)
    clean = backend.statistics(logits, labels, temperature)
    logits[3, 700] = torch.nan
    for got, want in zip(backend.statistics(logits, labels, temperature), clean, strict=True):
        assert got[3].isnan() and torch.equal(got[[0, 1, 2, 4, 5]], want[[0, 1, 2, 4, 5]])


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, of inf - inf
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("function", [linear_logps, linear_loss, logits_logps])
def test_a_row_without_a_coefficient_adds_nothing_whatever_it_holds(value, function):
    gradients = heads.gradients_beside_a_spoiled_row(
        function, value, device=DEVICE, kernel="triton"
    )
    for spoiled, without in gradients:
        torch.testing.assert_close(spoiled, without, rtol=1e-5, atol=1e-6)


def test_a_label_out_of_range_gives_nan():
    _, logits, _, temperature = surrounded_logits(61, torch.float32)
    logps, _, entropy = backend.statistics(
        logits, torch.tensor([-100, -1, 0, 60, 61, 10**6]).to(DEVICE), temperature
    )
    assert (
        logps.isnan().tolist() == [True, True, False, False, True, True]
        and entropy.isfinite().all()
    )


def test_tensors_of_any_layout():
    hidden, weight, labels, _ = on_device((5, 4, 61))
    dense, labels = hidden @ weight.T, labels.repeat_interleave(2)[::2]
    temperature, d_logps, d_entropy = (
        torch.full((1,), x, device=DEVICE).expand(5) for x in (0.7, -0.3, 0.2)
    )
    for logits in (
        dense.T.contiguous().T,
        dense[:1].expand(5, -1),
        dense.repeat_interleave(2, 1)[:, ::2],
    ):
        expected = rows.PLAIN.statistics(logits.contiguous(), labels, temperature)
        found = backend.statistics(logits, labels, temperature)
        rest = (labels, temperature, *found[1:], d_logps, d_entropy, torch.float32)
        expected += (
            rows.PLAIN.gradient(logits.clone(memory_format=torch.contiguous_format), *rest),
        )
        for got, want in zip((*found, backend.gradient(logits, *rest)), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_second_backward_is_refused():
    hidden, weight, labels, temperature = on_device((5, 4, 61))
    logits = (hidden @ weight.T).requires_grad_() * 1
    logps, _ = logits_logps(logits, labels, temperature, kernel="triton")
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_machine_code_does_not_spill_and_offsets_have_64_bits(tmp_path):
    """The kernels are compiled for three GPUs that are not here, for aligned rows and others."""
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this build of triton has no ptxas")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = [
        sys.executable,
        ROOT / "benchmarks/kernel_resources.py",
        "--json",
        tmp_path / "found.json",
    ]
    subprocess.run(
        [*script, "--vocab-sizes", "151936", "50257"],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    results = json.loads((tmp_path / "found.json").read_text())["results"]
    assert len(results) == 3 * 2 * 8
    for row in results:
        assert row["stack"] == 0, row
        assert row["row_offsets"] == ["i64"], row
        assert row["barrier"] == ("float32 to bfloat16" in row["kernel"]), row


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_beyond_two_to_the_31(narrow, monkeypatch):
    monkeypatch.undo()
    num_rows, vocab_size = 16_384, 151_936
    some = torch.tensor(
        [0, 14_133, 14_134, num_rows - 1], device=DEVICE
    )  # 2**31 lies in row 14,134
    logits = 3 * torch.randn(num_rows, vocab_size, device=DEVICE)
    labels = torch.randint(0, vocab_size, (num_rows,), device=DEVICE)
    temperature = 0.5 + torch.rand(num_rows, device=DEVICE)
    d_logps, d_entropy = torch.randn(2, num_rows, device=DEVICE)
    leaf = logits[some].double().requires_grad_()
    outputs = heads.restated_logits(leaf, labels[some], temperature[some])
    (expected,) = torch.autograd.grad(
        heads.mixed(*outputs, torch.stack((d_logps, d_entropy))[:, some]), leaf
    )
    logps, log_z, entropy = backend.statistics(logits, labels, temperature)
    for got, want in zip((logps, entropy), outputs, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got[some].double(), want.detach(), rtol=1e-6, atol=5e-5)
    found = backend.gradient(
        logits, labels, temperature, log_z, entropy, d_logps, d_entropy, narrow
    )
    for row in range(4):
        assert heads.relative(found[some[row]], expected[row]) < max(ERRORS[narrow], 2e-5)


@pytest.mark.gpu
def test_loss_at_full_size_equals_float64(monkeypatch):
    monkeypatch.undo()
    num_rows, vocab_size = 16_384, 151_936
    hidden, weight = (
        torch.randn(n, 256, device=DEVICE, dtype=torch.bfloat16) / 4 for n in (num_rows, vocab_size)
    )
    labels = torch.randint(0, vocab_size, (num_rows,), device=DEVICE)
    values = (hidden, weight, labels, torch.ones(num_rows, device=DEVICE), [512] * 32)
    advantages = torch.randn(32, device=DEVICE).where(torch.arange(32, device=DEVICE) % 4 > 0, 0)

    def loss_function(logps, entropy, first, last):
        return -(logps.view(last - first, 512).mean(1) * advantages[first:last]).sum(), None

    def run(function, *, dtype=torch.bfloat16, **options):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in values[:2]]
        loss, _ = function(*leaves, *values[2:], loss_function, **options)
        loss.backward()
        return loss.detach(), *(x.grad for x in leaves)

    exact = run(head.linear_loss, dtype=torch.float64, kernels=rows.PLAIN, chunk_size=1024)
    for chunk_size in (4096, num_rows):
        loss, d_hidden, d_weight = run(linear_loss, kernel="triton", chunk_size=chunk_size)
        torch.testing.assert_close(loss.double(), exact[0].double(), rtol=1e-5, atol=1e-5)
        assert (
            heads.relative(d_hidden, exact[1]) < 2.6e-3
            and heads.relative(d_weight, exact[2]) < 2.6e-3
        )
        assert (d_hidden.view(32, 512, -1)[::4] == 0).all()
