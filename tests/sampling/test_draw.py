"""Drawing a token: exact inversion of the distribution function, in little memory."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gspo.sampling.local import DRAW_BYTES, draw_tokens

VOCABULARIES = [7, 272, 5000, 8192, 151_936]


def logits_of(num_rows, vocab_size, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_rows, vocab_size, generator=generator)


def uniforms_of(num_rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_rows, dtype=torch.float64, generator=generator)


def distribution_function(logits, temperature):
    """[N, V] float64: sums over all weights before a token, itself included, from 0 to 1."""
    scaled = logits / temperature
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp()
    cumulative = weights.double().cumsum(-1)
    return cumulative / cumulative[:, -1:]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_draw_inverts_the_distribution_function(vocab_size):
    num_rows = 40
    logits, uniforms = logits_of(num_rows, vocab_size), uniforms_of(num_rows)
    before = logits.clone()
    tokens, logps = draw_tokens(logits, uniforms, 0.7)
    assert torch.equal(logits, before)
    cumulative = distribution_function(logits, 0.7)
    above = cumulative.gather(-1, tokens[:, None]).squeeze(-1)
    below = cumulative.gather(-1, (tokens[:, None] - 1).clamp(min=0)).squeeze(-1)
    below = torch.where(tokens == 0, 0.0, below)
    assert (below <= uniforms + 1e-12).all() and (uniforms < above + 1e-12).all()
    expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected.float(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("vocab_size", [5000, 151_936])
def test_draw_at_every_edge_of_a_block_takes_a_possible_token(vocab_size):
    """Uniforms just below, at and just above the share of the tokens before a block.

    Two tokens of three are impossible, among them all at the start and the end of a block.
    """
    logits = logits_of(1, vocab_size)
    index = torch.arange(vocab_size)
    logits[:, (index % 3 != 1) | (index % 512 < 4) | (index % 512 > 507)] = -torch.inf
    shares = distribution_function(logits, 1.0)[0, 511::512]
    ones = torch.ones_like(shares)
    uniforms = torch.cat([shares.nextafter(0 * ones), shares, shares.nextafter(ones)])
    uniforms = torch.cat([uniforms, torch.tensor([0.0, 1 - 2**-53])]).clamp(0.0, 1 - 2**-53)
    tokens, logps = draw_tokens(logits.expand(len(uniforms), -1), uniforms, 1.0)
    assert logits[0, tokens].isfinite().all() and logps.isfinite().all()
    possible = index[logits[0].isfinite()]
    assert tokens[-2:].tolist() == [possible[0], possible[-1]]


def test_draw_finds_tokens_rarer_than_float32_resolves():
    """Beside a token of nearly all the mass, a tail of 1e-9 in sum keeps its share and order."""
    vocab_size = 20_000
    logits = torch.full((1, vocab_size), -30.0)
    logits[0, 700] = 0.0
    tail = (vocab_size - 1) * torch.tensor(-30.0, dtype=torch.float64).exp()
    before = 700 / (vocab_size - 1) * tail
    uniforms = torch.stack([0.5 * before, 0.5 + 0 * tail, (1 + before + 0.5 * (tail - before))])
    uniforms = uniforms / (1 + tail)
    tokens, _ = draw_tokens(logits.expand(3, -1), uniforms, 1.0)
    assert tokens[:2].tolist() == [350, 700]
    assert abs(int(tokens[2]) - (700 + (vocab_size - 700) // 2)) <= 2


@pytest.mark.parametrize("vocab_size", [272, 151_936])
def test_one_dominating_token_is_drawn_with_certainty(vocab_size):
    logits = logits_of(5, vocab_size)
    logits[:, -1] = 1000.0
    uniforms = torch.tensor([0.0, 1e-300, 0.5, 0.999, 1 - 2**-53], dtype=torch.float64)
    tokens, logps = draw_tokens(logits, uniforms, 1.0)
    assert tokens.tolist() == [vocab_size - 1] * 5
    assert logps.tolist() == [0.0] * 5


@pytest.mark.parametrize("vocab_size", [272, 5000])
def test_a_row_that_is_not_finite_gives_a_token_of_the_vocabulary_and_nan(vocab_size):
    logits = logits_of(2, vocab_size)
    logits[1] = torch.nan
    tokens, logps = draw_tokens(logits, uniforms_of(2), 1.0)
    assert (tokens >= 0).all() and (tokens < vocab_size).all()
    assert logps.isnan().tolist() == [False, True]


def test_frequencies_over_a_large_vocabulary_follow_the_softmax():
    """Chi square over 24 bands of tokens: its 99.9 % point with 23 degrees of freedom is 50."""
    num_rows, vocab_size = 4096, 6000
    logits = logits_of(1, vocab_size)
    expanded = logits.expand(num_rows, -1)
    tokens, _ = draw_tokens(expanded, uniforms_of(num_rows), 1.0)
    observed = torch.bincount(tokens // 250, minlength=24)
    expected = num_rows * logits[0].double().softmax(-1).unflatten(0, (24, 250)).sum(-1)
    assert ((observed - expected) ** 2 / expected).sum() < 50


def peak_bytes(call):
    """Bytes that a call holds at its peak, temporaries inside of an operation included.

    A dispatch mode does not see those, and one of them is the point: a sum in float64 copies.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    assert changes
    return int(torch.tensor([size for _, size in sorted(changes)]).cumsum(0).max())


@pytest.mark.parametrize("temperature", [0.0, 0.7], ids=["greedy", "sampled"])
@pytest.mark.parametrize("vocab_size", [32_000, 151_936])
def test_draw_holds_few_bytes_an_entry(vocab_size, temperature):
    num_rows = 8
    logits, uniforms = logits_of(num_rows, vocab_size), uniforms_of(num_rows)
    peak = peak_bytes(lambda: draw_tokens(logits, uniforms, temperature))
    of_logits = 4
    assert of_logits + peak / logits.numel() <= DRAW_BYTES
    assert DRAW_BYTES < 12
