"""What a decode step launches, and its rotation of heads."""

import pytest
import torch
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.qwen2 import qwen2

from gspo.sampling import kv_cache
from gspo.sampling.cached_decoder import CachedDecoder
from gspo.sampling.rotary import Rotary
from tests.launches import count
from tests.sampling.test_local import build

DTYPES = [torch.float32, torch.bfloat16]


def launches_of_a_step(num_layers, **options):
    decoder = CachedDecoder(build(num_layers=num_layers, **options), max_prefill_tokens=64)
    with torch.no_grad():
        _, cache = decoder.prefill([[1, 2, 3], [4]])
        cache.expand(torch.tensor([0, 0, 1]), 8)
    return count(decoder.step, torch.tensor([5, 6, 7]), cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("builder", [qwen2, llama3_2])
def test_a_layer_of_a_step_launches_at_most_16_kernels(monkeypatch, builder, dtype):
    """Beside the 15 counted, CUDA copies the attention's output, in which heads are inside."""
    monkeypatch.setitem(kv_cache.COLUMN_BLOCK, "cpu", 16)
    options = dict(builder=builder, dtype=dtype)
    three, one = launches_of_a_step(3, **options), launches_of_a_step(1, **options)
    assert three - one <= 2 * 15


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("builder", [qwen2, llama3_2])  # halves, and neighbours
def test_heads_are_rotated_in_float32_and_the_others_stay(builder, dtype):
    decoder = build(builder, num_heads=2, num_kv_heads=2)
    module = decoder.layers[0].attn.pos_embeddings
    rotary = Rotary(module, 16, 64, torch.device("cpu"))
    heads = torch.randn(64, 5, 16).to(dtype)
    positions = torch.arange(64)[None]
    expected = module(heads[None].float(), input_pos=positions)[0].to(dtype)
    rotated = heads.clone()
    rotary.rotate_(rotated, 3, rotary.table)
    torch.testing.assert_close(rotated[:, :3], expected[:, :3], rtol=2**-7, atol=1e-5)
    assert torch.equal(rotated[:, 3:], heads[:, 3:])
