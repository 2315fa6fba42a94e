"""Logits with a softcap, in every backend, against float64."""

import pytest
import torch

from gspo.kernels import linear_logps, linear_loss
from tests.kernels.heads import inputs

CAP = 1.5
KERNELS = ["reference", "compile"]


def expected(hidden, weight, labels, temperature, weights):
    """Loss, log-probabilities and gradients by autograd, in float64."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    logits = CAP * torch.tanh(hidden @ weight.T / CAP)
    logps = (logits / temperature.double()[:, None]).log_softmax(-1)
    chosen = logps.gather(-1, labels[:, None]).squeeze(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    loss = (weights * chosen).sum() + 0.3 * (weights * entropy).sum()
    return loss, chosen, torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("chunk_size", [4096, 9], ids=["whole", "chunks"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fused", [True, False], ids=["loss", "logps"])
def test_values_and_gradients_are_those_of_float64(kernel, chunk_size, fused):
    hidden, weight, labels, temperature = inputs((63, 16, 61))
    hidden, weight = 3 * hidden, 3 * weight  # far into the bend
    weights = torch.linspace(-1, 1, 63)
    weights[10:20] = 0.0  # rows without a gradient
    loss, chosen, grads = expected(hidden, weight, labels, temperature, weights.double())
    assert (CAP * torch.tanh(hidden @ weight.T / CAP)).abs().max() > 0.95 * CAP
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    options = {
        "chunk_size": chunk_size,
        "kernel": kernel,
        "softcap": CAP,
        "entropy_grad": True,
    }
    if fused:
        bounds = [0, 20, 41, 63]
        starts = dict(enumerate(bounds))

        def of_documents(logps, entropy, first, last):
            mine = weights[starts[first] : starts[last]]
            return (mine * logps).sum() + 0.3 * (mine * entropy).sum(), logps.detach()

        found, parts = linear_loss(
            hidden, weight, labels, temperature, [20, 21, 22], of_documents, **options
        )
        logps = torch.cat(parts)
    else:
        logps, entropy = linear_logps(hidden, weight, labels, temperature, **options)
        found = (weights * logps).sum() + 0.3 * (weights * entropy).sum()
    torch.testing.assert_close(logps.detach().double(), chosen.detach(), rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(found, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
