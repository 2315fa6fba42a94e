"""The plain-torch loss head against a float64 restatement, in value and gradient."""

import pytest
import torch

from gspo.kernels import linear_logps
from tests.kernels.heads import inputs

SIZES = {"one": (1, 3, 2), "odd": (63, 16, 61), "long": (257, 8, 129)}  # T, H, V
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def restated(hidden, weight, labels, temperature):
    """Row by row in float64."""
    logps, entropy = [], []
    for h, y, t in zip(hidden.double(), labels.tolist(), temperature.double(), strict=True):
        logits = torch.stack([(h * w).sum() for w in weight.double()]) / t
        log_z = logits.max() + (logits - logits.max()).exp().sum().log()
        p = (logits - log_z).exp()
        logps.append(logits[y] - log_z)
        entropy.append(-(p * (logits - log_z)).sum())
    return torch.stack(logps), torch.stack(entropy)


def gradients(function, hidden, weight, labels, temperature):
    """Values, and the gradients of a fixed mix of both outputs."""
    hidden, weight = (
        hidden.detach().clone().requires_grad_(),
        weight.detach().clone().requires_grad_(),
    )
    logps, entropy = function(hidden, weight, labels, temperature)
    mix = torch.linspace(-1, 1, logps.numel(), dtype=logps.dtype)
    total = (mix * logps).sum() + (mix.flip(0) * entropy).sum() * float(entropy.requires_grad)
    return logps.detach(), entropy.detach(), *torch.autograd.grad(total, (hidden, weight))


@each_size
@pytest.mark.parametrize("chunk_size", [4096, 7], ids=["whole", "chunks"])
def test_head_equals_float64(size, chunk_size):
    values = inputs(size)
    found = gradients(
        lambda *x: linear_logps(*x, chunk_size=chunk_size, entropy_grad=True), *values
    )
    expected = gradients(restated, *values)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


@each_size
def test_chunks_change_nothing(size):
    values = [x.double() if x.is_floating_point() else x for x in inputs(size)]
    whole, chunked = (
        gradients(lambda *x, n=n: linear_logps(*x, chunk_size=n), *values) for n in (4096, 7)
    )
    for got, want in zip(chunked, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_entropy_lets_gradients_through_only_when_asked():
    hidden, weight, labels, temperature = inputs((5, 4, 9))
    hidden.requires_grad_()
    assert not linear_logps(hidden, weight, labels, temperature)[1].requires_grad
    _, entropy = linear_logps(hidden, weight, labels, temperature, entropy_grad=True)
    (grad,) = torch.autograd.grad(entropy.sum(), hidden)
    assert grad.abs().max() > 1e-3


def test_temperature_is_each_rows_own():
    hidden, weight, labels, temperature = inputs((6, 4, 9))
    together, _ = linear_logps(hidden, weight, labels, temperature)
    alone = [
        linear_logps(hidden[i : i + 1], weight, labels[i : i + 1], temperature[i : i + 1])[0]
        for i in range(6)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    assert (together - linear_logps(hidden, weight, labels, torch.ones(6))[0]).abs().min() > 1e-3


@each_size
def test_bfloat16_inputs_are_not_rounded_again(size):
    values = inputs(size, dtype=torch.bfloat16)
    logps, entropy = linear_logps(*values)
    expected = restated(*values)  # float64 on the same rounded inputs
    assert logps.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [4096, 1])
def test_no_rows_give_zero_gradients(chunk_size):
    hidden, weight, labels, temperature = inputs((3, 4, 9))
    rows = torch.zeros(0, dtype=torch.int64)
    weight.requires_grad_()
    logps, entropy = linear_logps(
        hidden[rows], weight, labels[rows], temperature[rows], chunk_size=chunk_size
    )
    assert logps.shape == entropy.shape == (0,)
    assert torch.autograd.grad(logps.sum(), weight)[0].eq(0).all()


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_logits_far_from_zero_lose_nothing(shift):
    hidden, weight, labels, temperature = inputs((7, 4, 9))
    hidden = torch.cat((hidden, torch.ones(7, 1)), 1)
    near = linear_logps(hidden, torch.cat((weight, torch.zeros(9, 1)), 1), labels, temperature)
    far = linear_logps(
        hidden, torch.cat((weight, torch.full((9, 1), shift)), 1), labels, temperature
    )
    for got, want in zip(far, near, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-3)  # an ulp at 600 is 6e-5


def test_peaked_rows_stay_finite():
    hidden, weight, labels, temperature = inputs((33, 8, 61), scale=200.0)
    found = gradients(
        lambda *x: linear_logps(*x, entropy_grad=True), hidden, weight, labels, temperature
    )
    assert all(x.isfinite().all() for x in found)
    assert found[0].min() < -100 and found[1].min() < 1e-6
