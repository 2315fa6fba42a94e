"""The cache in blocks of columns, as on CUDA, and how it grows."""

import bisect

import pytest
import torch
import torch.nn.functional as F

from gspo.sampling import kv_cache
from gspo.sampling.local import LocalSampler
from gspo.types import SamplingParams
from tests.sampling.test_local import RAGGED, Letters, build, prompts_of, seeds_of, tokens_of

NUM_LAYERS = 2


@pytest.fixture
def poisoned():
    """Fills what ``empty`` gives with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def sampler_of(max_seq_len=512, **options):
    model = build(max_seq_len=max_seq_len)
    return LocalSampler(lambda: model, Letters(), **options)


def completions_of(sampler, *, max_new_tokens, lengths, group_size=1):
    prompts = prompts_of(lengths)
    params = SamplingParams(temperature=0.7, max_new_tokens=max_new_tokens)
    return sampler.sample(prompts, group_size=group_size, params=params, seeds=seeds_of(prompts))


def attention_signatures(monkeypatch):
    """The shapes and strides that attention sees, each once: what a plan of its kernel is for."""
    signatures = set()
    attend = F.scaled_dot_product_attention

    def recorded(q, k, v, attn_mask=None, **options):
        inputs = [x for x in (q, k, v, attn_mask) if x is not None]
        signatures.add(tuple((*x.shape, *x.stride()) for x in inputs))
        return attend(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return signatures


@pytest.mark.parametrize("lengths", [[5, 3], [5, 5]], ids=["ragged", "equal"])
def test_attention_sees_few_shapes_in_a_rollout_and_no_new_ones_later(monkeypatch, lengths):
    monkeypatch.setitem(kv_cache.COLUMN_BLOCK, "cpu", 32)
    monkeypatch.setattr(kv_cache, "_FIRST_COLUMNS", 32)
    signatures = attention_signatures(monkeypatch)
    sampler = sampler_of(stop_token_ids=[])
    completions_of(sampler, max_new_tokens=150, lengths=lengths)
    num_blocks = 5  # of 32 columns, for 150 tokens and the prompt
    in_prefill = 2  # whole prompts, and their last tokens
    assert num_blocks < len(signatures) <= num_blocks + in_prefill
    first = set(signatures)
    completions_of(sampler, max_new_tokens=150, lengths=lengths)
    assert signatures == first


@pytest.mark.parametrize("lengths", [RAGGED, [5, 5, 5, 5]], ids=["ragged", "equal"])
@pytest.mark.parametrize("block", [2, 16, 256])
def test_columns_in_blocks_change_nothing(monkeypatch, poisoned, block, lengths):
    """Rows end and leave the batch, and the cache grows, while columns in sight hold no token."""
    monkeypatch.setattr(kv_cache, "_FIRST_COLUMNS", 2)
    options = dict(max_new_tokens=40, lengths=lengths, group_size=4)
    expected = completions_of(sampler_of(stop_token_ids=[7, 8, 9, 10]), **options)
    monkeypatch.setitem(kv_cache.COLUMN_BLOCK, "cpu", block)
    in_blocks = completions_of(sampler_of(stop_token_ids=[7, 8, 9, 10]), **options)
    assert tokens_of(in_blocks) == tokens_of(expected)
    assert len({len(tokens) for group in tokens_of(expected) for tokens in group}) > 2
    for one, other in zip(sum(in_blocks, []), sum(expected, []), strict=True):
        assert one.logps == pytest.approx(other.logps, abs=5e-6)


@pytest.mark.parametrize("block", [1, 16])
def test_capacity_doubles_up_to_what_the_longest_completion_needs(block):
    empty = torch.zeros(2, 1, 10, 4)
    lengths = torch.tensor([10, 7])
    cache = kv_cache.KVCache([empty], [empty], lengths, True, block=block)
    cache.expand(torch.tensor([0, 1, 1]), 1000)
    capacities = [cache.capacity]
    for _ in range(1000):
        cache.add_column()
        assert cache.num_columns <= cache.num_attended <= cache.capacity
        assert cache.num_attended % block == 0
        if cache.capacity != capacities[-1]:
            capacities.append(cache.capacity)
    expected = {1: [266, 532, 1010], 16: [272, 544, 1024]}
    assert capacities == expected[block]


class Allocator:
    """A caching allocator: a block that is given back serves the next request that fits in it."""

    def __init__(self):
        self.free = []  # sizes, ascending
        self.num_new = 0  # requests that no free block was large enough for

    def take(self, size):
        index = bisect.bisect_left(self.free, size)
        if index == len(self.free):
            self.num_new += 1
            return size
        return self.free.pop(index)

    def give_back(self, size):
        bisect.insort(self.free, size)


def test_a_growing_cache_asks_for_little_new_memory(monkeypatch):
    """Of each tensor it takes five sizes for 4,000 tokens; 256 columns more at a time take 16."""
    allocator = Allocator()
    copy_rows = kv_cache._copy_rows

    def recorded(old, *options):
        new = copy_rows(old, *options)
        allocator.take(new.nbytes)
        allocator.give_back(old.nbytes)
        return new

    monkeypatch.setattr(kv_cache, "_copy_rows", recorded)
    layers = [torch.zeros(2, 1, 10, 4) for _ in range(NUM_LAYERS)]
    lengths = torch.tensor([10, 7])
    cache = kv_cache.KVCache(layers, list(layers), lengths, True, block=16)
    cache.expand(torch.arange(2), 4000)
    for _ in range(4000):
        cache.add_column()
    num_tensors = 2 * NUM_LAYERS
    assert allocator.num_new == 5 * num_tensors
