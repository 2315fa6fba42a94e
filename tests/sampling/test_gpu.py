"""The sampler on a GPU: graphs, norms and draws against what they stand for."""

import pytest
import torch

from gspo.norm import fuse_norms
from gspo.sampling.local import DRAW_BYTES, LocalSampler, draw_tokens
from tests.launches import Launches
from tests.sampling.test_draw import distribution_function, logits_of, uniforms_of
from tests.sampling.test_kv_cache import completions_of
from tests.sampling.test_local import Letters, build, full_logps, prompts_of, tokens_of
from tests.test_norm import norms_of

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LENGTHS = [3, 9, 1, 4, 4, 14]
# Longer than a block of columns; rows end and leave the batch.
OPTIONS = dict(max_new_tokens=400, lengths=LENGTHS, group_size=8)
# Fused attention needs heads of at least 16.
HEADS = dict(num_heads=2, num_kv_heads=1, max_seq_len=512)


def sampler_of(dtype, **options):
    model = build(dtype=dtype, **HEADS).to(DEVICE)
    return LocalSampler(lambda: model, Letters(), stop_token_ids=[7, 8], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_graphs_give_the_same_completions(dtype):
    expected = completions_of(sampler_of(dtype), **OPTIONS)
    sampler = sampler_of(dtype, cuda_graphs=True)
    for _ in range(2):
        replayed = completions_of(sampler, **OPTIONS)
        assert tokens_of(replayed) == tokens_of(expected)
        for one, other in zip(sum(replayed, []), sum(expected, []), strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-5)


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["plain", "graphs"])
def test_logps_in_blocks_of_columns_match_a_full_forward(cuda_graphs):
    torch.backends.cuda.matmul.allow_tf32 = False
    groups = completions_of(sampler_of(torch.float32, cuda_graphs=cuda_graphs), **OPTIONS)
    plain = build(**HEADS)
    for prompt, group in zip(prompts_of(LENGTHS), groups, strict=True):
        for completion in group:
            expected = full_logps(plain, prompt, completion, 0.7)
            difference = expected - torch.tensor(completion.logps)
            assert difference.abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fused_norm_is_one_kernel_within_one_rounding(dtype):
    plain, fused = (norm.to(DEVICE) for norm in norms_of(dtype))
    fuse_norms(fused)
    x = torch.randn(257, 96, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        rounding = 2**-7 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(fused(x), plain(x), rtol=rounding, atol=0)
        with Launches(one_kernel_each=()) as launches:
            fused(x)
    assert launches.names == ["aten._fused_rms_norm.default"]


@pytest.mark.parametrize("vocab_size", [272, 5000, 151_936])
def test_draw_inverts_the_distribution_function(vocab_size):
    logits, uniforms = logits_of(40, vocab_size).to(DEVICE), uniforms_of(40).to(DEVICE)
    tokens, logps = draw_tokens(logits, uniforms, 0.7)
    cumulative = distribution_function(logits, 0.7)
    above = cumulative.gather(-1, tokens[:, None]).squeeze(-1)
    below = cumulative.gather(-1, (tokens[:, None] - 1).clamp(min=0)).squeeze(-1)
    below = torch.where(tokens == 0, 0.0, below)
    assert (below <= uniforms + 1e-12).all() and (uniforms < above + 1e-12).all()
    expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(logps, expected.float(), rtol=0, atol=5e-6)


def test_draw_holds_few_bytes_an_entry():
    logits, uniforms = logits_of(64, 151_936).to(DEVICE), uniforms_of(64).to(DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    draw_tokens(logits, uniforms, 0.7)
    peak = torch.cuda.max_memory_allocated() - before
    assert 4 + peak / logits.numel() <= DRAW_BYTES
