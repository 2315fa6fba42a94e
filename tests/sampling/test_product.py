"""Packed weights: the numbers of plain ones, and never those of a weight that has changed."""

import pytest
import torch
from torch import nn

from gspo.compat import can_pack_weights
from gspo.plan.layout import _packed_bytes
from gspo.sampling import product
from gspo.sampling.cached_decoder import CachedDecoder
from gspo.sampling.local import LocalSampler
from gspo.sampling.product import Product
from gspo.types import SamplingParams
from tests.sampling.test_local import (
    MODELS,
    RAGGED,
    Letters,
    build,
    full_logps,
    policy_of,
    prompts_of,
    sample,
    seeds_of,
    tokens_of,
)

needs_packing = pytest.mark.skipif(not can_pack_weights(), reason="torch without oneDNN")


def linear_of(num_in, num_out, bias, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(num_in, num_out, bias=bias)
    return linear.requires_grad_(False)


@pytest.fixture
def pack_all(monkeypatch):
    monkeypatch.setattr(product, "PACKED_FROM", 0)


@needs_packing
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("num_rows", [1, 63, 257])
def test_packed_products_are_those_of_the_weight(pack_all, num_rows, bias):
    linear = linear_of(65, 97, bias)
    packed = Product(linear)
    packed.refresh()
    assert packed._packed is not None
    x, other = torch.randn(num_rows, 65), torch.randn(num_rows, 97)
    expected = linear(x)
    close = dict(rtol=0, atol=5e-6)
    torch.testing.assert_close(packed(x), expected, **close)
    torch.testing.assert_close(packed.add(x, other), expected + other, **close)
    activated = packed.activate(x, nn.SiLU())
    torch.testing.assert_close(activated, nn.functional.silu(expected), **close)
    activated = packed.activate(x, nn.GELU())
    torch.testing.assert_close(activated, nn.functional.gelu(expected), **close)
    torch.testing.assert_close(packed.multiply_(x, other.clone()), expected * other, **close)
    assert packed.out_features == 97


@needs_packing
def test_a_weight_that_changes_is_packed_anew(pack_all):
    linear, other = linear_of(65, 97, False), linear_of(65, 97, False, seed=1)
    packed = Product(linear)
    packed.refresh()
    before = packed._packed
    packed.refresh()
    assert packed._packed is before
    linear.weight.copy_(other.weight)
    packed.refresh()
    x = torch.randn(3, 65)
    torch.testing.assert_close(packed(x), other(x), rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_not_packed(pack_all, dtype):
    linear = linear_of(65, 97, True).to(dtype)
    plain = Product(linear)
    plain.refresh()
    assert plain._packed is None
    x = torch.randn(3, 65).to(dtype)
    assert torch.equal(plain(x), linear(x))


def test_small_weights_are_not_packed():
    plain = Product(linear_of(65, 97, True))
    plain.refresh()
    assert plain._packed is None


@needs_packing
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_a_packed_decoder_follows_its_weights_and_depends_on_no_batch(pack_all, options):
    prompts, params = prompts_of(RAGGED), SamplingParams(0.7, 12)
    sampler, other = LocalSampler(lambda: build(**options), Letters()), build(**options, seed=1)
    seeds = seeds_of(prompts)
    before = sampler.sample(prompts, group_size=2, params=params, seeds=seeds)
    sampler.update(policy_of(other), 7)
    after = sampler.sample(prompts, group_size=2, params=params, seeds=seeds)
    assert tokens_of(after) != tokens_of(before)
    for prompt, group in zip(prompts, after, strict=True):
        for completion in group:
            expected = full_logps(other, prompt, completion, 0.7)
            assert (expected - torch.tensor(completion.logps)).abs().max() < 1e-5
    apart = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        apart += sampler.sample([prompt], group_size=2, params=params, seeds=[seed])
    assert tokens_of(apart) == tokens_of(after)
    alone = sample(build(**options, seed=1), prompts, group_size=2, seed=0, max_batch_size=1)
    assert tokens_of(alone) == tokens_of(after)


@needs_packing
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_the_plan_counts_the_bytes_that_are_packed(pack_all, options):
    model = build(**options)
    counted = _packed_bytes(model)
    decoder = CachedDecoder(model, max_prefill_tokens=16)
    with torch.no_grad():
        decoder.prefill([[1, 2]])
    products = [decoder.head]
    for layer in decoder.layers:
        products += layer.products
    packed = [one.weight.nbytes for one in products if one._packed is not None]
    assert len(packed) == len(products)
    assert counted == sum(packed) > 0
