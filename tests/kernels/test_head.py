"""The chunked loss head against float64, for each backend that runs on a CPU."""

import pytest
import torch

from gspo.errors import InputError
from gspo.kernels import (
    choose_kernel,
    linear_logps,
    linear_loss,
    logits_logps,
    rows,
    rows_per_chunk,
)
from tests.kernels import heads

SIZES = {"one": (1, 3, 2), "odd": (63, 16, 61), "prime_vocabulary": (129, 24, 1187)}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
each_kernel = pytest.mark.parametrize("kernel", ["reference", "compile"])
each_chunk = pytest.mark.parametrize("chunk_size", [4096, 64, 7])


@each_size
@each_kernel
@each_chunk
def test_linear_logps_equals_float64(size, kernel, chunk_size):
    values, weights = heads.inputs(size), heads.mix_weights(size[0])
    options = {"chunk_size": chunk_size, "entropy_grad": True, "kernel": kernel}
    found = heads.gradients(lambda *x: linear_logps(*x, **options), weights, *values)
    expected = heads.gradients(heads.restated, weights, *values)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=2e-5)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bit_logits_are_rounded_once(kernel, dtype):
    """At label probabilities near 1, where the gradient of the label is a small difference."""
    logits = torch.randn(40, 61, generator=torch.Generator().manual_seed(0))
    labels, temperature = torch.arange(40), torch.ones(40)
    logits[labels, labels] += torch.linspace(0, 9, 40)
    logits, weights = logits.to(dtype), heads.mix_weights(40, zeros=0.2)
    found = heads.gradients(
        lambda *x: logits_logps(*x, entropy_grad=True, kernel=kernel),
        weights,
        logits,
        labels,
        temperature,
    )
    expected = heads.gradients(heads.restated_logits, weights, logits.double(), labels, temperature)
    for got, want in zip(found[-1], expected[-1], strict=True):
        assert not want.any() or heads.relative(got, want) < 4e-3


@each_size
@each_kernel
def test_logits_logps_equals_float64(size, kernel):
    hidden, weight, labels, temperature = heads.inputs(size)
    logits, weights = hidden @ weight.T, heads.mix_weights(size[0])
    found = heads.gradients(
        lambda *x: logits_logps(*x, entropy_grad=True, kernel=kernel),
        weights,
        logits,
        labels,
        temperature,
    )
    expected = heads.gradients(heads.restated_logits, weights, logits, labels, temperature)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


def loss_case(size, *, entropy_coef=0.0, dtype=torch.float32):
    values = heads.inputs(size, dtype=dtype, scale=0.3)
    counts = heads.documents(size[0])
    generator = torch.Generator().manual_seed(1)
    old = heads.restated(*values)[0] + torch.randn(size[0], generator=generator)
    advantages = torch.randn(len(counts), generator=generator)
    advantages[::5] = 0
    return values, counts, heads.sequence_loss(old, advantages, counts, entropy_coef)


@each_size
@each_kernel
@each_chunk
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1], ids=["plain", "entropy_bonus"])
def test_linear_loss_equals_float64(size, kernel, chunk_size, entropy_coef):
    values, counts, loss_function = loss_case(size, entropy_coef=entropy_coef)
    options = {"kernel": kernel, "chunk_size": chunk_size, "entropy_grad": entropy_coef > 0}
    loss, clipped, *found = heads.loss_and_gradients(values, counts, loss_function, **options)
    expected_loss, expected_clipped, *expected = heads.restated_loss(values, counts, loss_function)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)
    assert clipped == expected_clipped and (clipped > 3 or size[0] < 60)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
        assert not want.any() or heads.relative(got, want) < 1e-5


@each_kernel
def test_rows_without_a_coefficient_get_exact_zeros(kernel):
    values, counts, loss_function = loss_case((129, 24, 1187))
    *_, grad, _ = heads.loss_and_gradients(
        values, counts, loss_function, kernel=kernel, chunk_size=32
    )
    *_, expected, _ = heads.restated_loss(values, counts, loss_function)
    dead = (expected == 0).all(-1)
    assert 10 < dead.sum() < 120
    assert (grad[dead] == 0).all() and (grad[~dead] != 0).any(-1).all()


def test_bf16_keeps_to_the_accuracy_table():
    size = (512, 64, 2053)
    values, counts, loss_function = loss_case(size, dtype=torch.bfloat16)
    exact, exact_entropy = heads.restated(*values)
    *_, expected_hidden, expected_weight = heads.restated_loss(values, counts, loss_function)
    errors = []
    for num_chunks in (1, 64):
        options = {"kernel": "compile", "chunk_size": size[0] // num_chunks}
        logps, entropy = linear_logps(*values, **options)
        assert (logps - exact).abs().max() < 5e-5 and (entropy - exact_entropy).abs().max() < 1e-4
        assert (logps - exact).view(-1, 64).mean(
            -1
        ).abs().max() < 1e-6  # over documents of 64 tokens
        *_, d_hidden, d_weight = heads.loss_and_gradients(values, counts, loss_function, **options)
        errors.append(
            (heads.relative(d_hidden, expected_hidden), heads.relative(d_weight, expected_weight))
        )
        assert max(errors[-1]) < 2.6e-3, errors
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_counts_that_are_not_the_rows_are_refused():
    values, counts, loss_function = loss_case((63, 16, 61))
    with pytest.raises(ValueError, match="label_counts add up to 64, but there are 63 labels"):
        linear_loss(*values, [*counts, 1], loss_function)


@each_kernel
@pytest.mark.parametrize("chunk_size", [4096, 20])
def test_an_objective_may_be_constant_on_some_documents(kernel, chunk_size):
    values, counts, _ = loss_case((63, 16, 61))

    def loss_function(logps, entropy, first, last):
        return (logps.sum() if first == 0 else logps.new_zeros(())), 0

    loss, _, d_hidden, _ = heads.loss_and_gradients(
        values, counts, loss_function, kernel=kernel, chunk_size=chunk_size
    )
    assert loss < 0 and d_hidden[0].any()


@each_kernel
@pytest.mark.parametrize("extra", ["hidden", "labels", "temperature"])
def test_inputs_of_different_lengths_are_refused(kernel, extra):
    hidden, weight, labels, temperature = heads.inputs((5, 4, 9))
    rows = {"hidden": hidden, "labels": labels, "temperature": temperature}
    rows[extra] = torch.cat((rows[extra], rows[extra][:1]))
    with pytest.raises(ValueError, match="rows, .* labels and .* temperatures: one each is needed"):
        linear_logps(rows["hidden"], weight, rows["labels"], rows["temperature"], kernel=kernel)


@each_kernel
def test_without_gradients_results_hold_no_graph(kernel):
    values, counts, _ = loss_case((63, 16, 61))
    with torch.no_grad():
        _, results = linear_loss(
            *values, counts, lambda logps, *_: (logps.sum(), logps.sum()), kernel=kernel
        )
    assert not any(result.requires_grad for result in results)


def test_reference_is_float32_under_autocast():
    values = heads.inputs((63, 16, 61))
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = linear_logps(*values, kernel="reference")
    torch.testing.assert_close(logps.double(), heads.restated(*values)[0], rtol=0, atol=1e-5)


@each_kernel
def test_a_frozen_head_gets_no_gradient(kernel):
    values, counts, loss_function = loss_case((63, 16, 61))
    hidden = values[0].clone().requires_grad_()
    loss, _ = linear_loss(hidden, *values[1:], counts, loss_function, kernel=kernel, chunk_size=16)
    loss.backward()
    assert values[1].grad is None
    *_, expected, _ = heads.restated_loss(values, counts, loss_function)
    torch.testing.assert_close(3 * hidden.grad.double(), expected, rtol=1e-4, atol=1e-5)


@each_kernel
def test_without_gradients_the_loss_is_a_number(kernel):
    values, counts, loss_function = loss_case((63, 16, 61))
    with torch.no_grad():
        loss, _ = linear_loss(*values, counts, loss_function, kernel=kernel, chunk_size=16)
    assert not loss.requires_grad
    assert float(loss) == pytest.approx(
        heads.restated_loss(values, counts, loss_function)[0], rel=1e-5
    )


@each_kernel
@each_chunk
def test_no_rows_give_zero_gradients(kernel, chunk_size):
    hidden, weight, labels, temperature = heads.inputs((3, 4, 9))
    none = torch.zeros(0, dtype=torch.int64)
    hidden, weight = hidden[none].requires_grad_(), weight.requires_grad_()
    rows = (hidden, weight, labels[none], temperature[none])
    logps, entropy = linear_logps(*rows, chunk_size=chunk_size, kernel=kernel)
    assert logps.shape == entropy.shape == (0,)
    assert torch.autograd.grad(logps.sum(), weight)[0].eq(0).all()
    seen = []

    def loss_function(logps, entropy, first, last):
        seen.append((logps.numel(), first, last))
        return logps.sum(), "result"

    loss, results = linear_loss(*rows, [0, 0], loss_function, chunk_size=chunk_size, kernel=kernel)
    assert loss.detach() == 0 and seen == [(0, 0, 2)] and results == ["result"]
    assert torch.autograd.grad(loss, weight)[0].eq(0).all()


@each_kernel
def test_logits_far_apart_and_infinite_stay_exact(kernel):
    """All-negative rows, a spread beyond the range of exp, and -inf entries."""
    logits = torch.full((5, 61), -300.0)
    logits[0, 3], logits[1, 5], logits[2] = -299.0, 88.0, torch.linspace(-1e4, -1e3, 61)
    logits[3, 7:] = -torch.inf
    logits[4] = 300.0 + torch.arange(61.0)
    labels, temperature = torch.tensor([3, 4, 60, 2, 60]), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7])
    weights = heads.mix_weights(5, zeros=0)
    if kernel == "reference":  # whose entropy does not take -inf
        logits[3, 7:] = -1e4
    found = heads.gradients(
        lambda *x: logits_logps(*x, entropy_grad=True, kernel=kernel),
        weights,
        logits,
        labels,
        temperature,
    )
    expected = heads.gradients(
        heads.restated_logits, weights, logits.clamp(min=-1e5), labels, temperature
    )
    for got, want in zip(found, expected, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [rows.PLAIN, rows.compiled()], ids=["plain", "compile"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["plain", "entropy"])
def test_no_gradient_is_subnormal(kernels, with_entropy):
    """A product of numbers below 1.2e-38 takes 40 times as long on a CPU."""
    logits = torch.linspace(-120.0, 0.0, 1187).expand(5, -1).contiguous()
    labels, temperature, small = (
        torch.arange(5),
        torch.linspace(0.5, 1.5, 5),
        torch.full((5,), 1e-6),
    )
    logps, log_z, entropy = kernels.statistics(logits, labels, temperature)
    expected = (logits / temperature[:, None]).double().log_softmax(-1)
    torch.testing.assert_close(logps.double(), expected[:, :5].diagonal(), rtol=1e-6, atol=1e-5)
    rest = (
        labels,
        temperature,
        log_z,
        entropy,
        small,
        small if with_entropy else None,
        torch.float32,
    )
    assert kernels.gradient(logits, *rest).abs().min() > torch.finfo(torch.float32).tiny


@each_kernel
def test_two_runs_are_bitwise_equal(kernel):
    values, counts, loss_function = loss_case((129, 24, 1187))
    one, two = (
        heads.loss_and_gradients(values, counts, loss_function, kernel=kernel, chunk_size=32)
        for _ in range(2)
    )
    assert one[:2] == two[:2] and all(
        torch.equal(a, b) for a, b in zip(one[2:], two[2:], strict=True)
    )


def test_a_row_of_nan_spoils_no_other():
    values, counts, loss_function = loss_case((129, 24, 1187))
    clean = linear_logps(*values, chunk_size=32, kernel="compile")
    values[0][40] = torch.nan
    spoiled = linear_logps(*values, chunk_size=32, kernel="compile")
    others = torch.arange(129) != 40
    for a, b in zip(clean, spoiled, strict=True):
        assert torch.equal(a[others], b[others]) and b[40].isnan()
    weights = torch.where(others, 1.0, 0.0)  # as a quarantined document has it
    hidden, weight = (x.clone().requires_grad_() for x in values[:2])
    logps, _ = linear_logps(hidden, weight, *values[2:], chunk_size=32, kernel="compile")
    grads = torch.autograd.grad((torch.where(others, logps, 0.0) * weights).sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in grads) and (grads[0][40] == 0).all()


@each_kernel
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("function", [linear_logps, linear_loss, logits_logps])
def test_a_row_without_a_coefficient_adds_nothing_whatever_it_holds(kernel, value, function):
    gradients = heads.gradients_beside_a_spoiled_row(function, value, kernel=kernel)
    for spoiled, without in gradients:
        torch.testing.assert_close(spoiled, without, rtol=1e-5, atol=1e-6)


def test_gradients_are_handed_out_once():
    values, counts, loss_function = loss_case((63, 16, 61))
    hidden = values[0].clone().requires_grad_()
    loss, _ = linear_loss(
        hidden, *values[1:], counts, loss_function, kernel="compile", chunk_size=16
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call backward once"):
        loss.backward()


@pytest.mark.parametrize(
    ("kernel", "device", "vocab_size", "chosen"),
    [
        ("auto", "cuda", 100, "triton"),
        ("auto", "cpu", 100, "reference"),
        ("auto", "cpu", 32_768, "compile"),
        ("auto", "xpu", 32_768, "compile"),
        ("reference", "cuda", 32_768, "reference"),
    ],
)
def test_choose_kernel(kernel, device, vocab_size, chosen):
    assert choose_kernel(kernel, device, vocab_size) == chosen


def test_choose_kernel_does_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    choose_kernel.cache_clear()
    assert choose_kernel("auto", "cpu", 32_768) == "reference"
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler; install g\\+\\+"):
        choose_kernel("compile", "cpu", 32_768)
    choose_kernel.cache_clear()


def test_choose_kernel_refuses(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choose_kernel.cache_clear()
    with pytest.raises(
        InputError, match="^kernel: 'cuda' must be one of auto, triton, compile, reference"
    ):
        choose_kernel("cuda", "cpu", 100)
    with pytest.raises(InputError, match="kernel: 'triton' needs a CUDA device, not cpu"):
        choose_kernel("triton", "cpu", 100)


def test_rows_per_chunk_bounds_the_buffer():
    assert rows_per_chunk(32_768, "cpu") == 768
    assert rows_per_chunk(151_936, "cpu") * 151_936 * 4 <= 96 * 2**20
    assert rows_per_chunk(10**9, "cpu") == 16
