"""Capture and replay of decode steps, with stand-ins for ``torch.cuda``'s graphs on a CPU."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

from gspo.errors import InputError
from gspo.sampling import kv_cache
from gspo.sampling.cached_decoder import CachedDecoder
from gspo.sampling.decode_graph import DecodeGraph
from gspo.sampling.local import LocalSampler
from tests.sampling.test_kv_cache import completions_of, sampler_of
from tests.sampling.test_local import Letters, build, tokens_of

BLOCK = 16


class Device:
    """Records what is captured and what is replayed.

    A captured step computes nothing. Its replay computes with the tensors and the numbers of the
    moment of its capture, as a CUDA graph does.
    """

    def __init__(self, monkeypatch):
        self.underway = None  # the graph that is being captured
        self.graphs = []
        self.num_runs = 0  # steps that were neither captured nor replayed
        self.num_replays = 0
        self.options = None
        self.decode = CachedDecoder.decode
        stream = SimpleNamespace(wait_stream=lambda other: None)
        names = dict(
            Stream=lambda *_: stream,
            stream=contextlib.nullcontext,
            current_stream=lambda: stream,
            graph_pool_handle=lambda: "pool",
            CUDAGraph=SimpleNamespace,
            graph=self.capture,
        )
        for name, stand_in in names.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(
            CachedDecoder, "decode", lambda decoder, *inputs: self.run(decoder, *inputs)
        )

    @contextlib.contextmanager
    def capture(self, graph, **options):
        self.options = options
        self.underway = graph
        self.graphs.append(graph)
        yield
        self.underway = None

    def run(self, decoder, tokens, cache, num_attended):
        if self.underway is None:
            self.num_runs += 1
            return self.decode(decoder, tokens, cache, num_attended)
        logits = torch.full((tokens.numel(), decoder.head.out_features), torch.nan)
        then = copy.copy(cache)
        then.keys, then.values = list(cache.keys), list(cache.values)

        def replay():
            self.num_replays += 1
            logits.copy_(self.decode(decoder, tokens, then, num_attended))

        self.underway.replay = replay
        return logits


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setitem(kv_cache.COLUMN_BLOCK, "cpu", BLOCK)
    return Device(monkeypatch)


def graphed(sampler):
    """Switches graphs on, which the sampler refuses on a CPU."""
    sampler._graph_stream = torch.cuda.Stream()
    return sampler


def test_replayed_steps_give_the_same_completions(monkeypatch, device):
    """Rows end and leave the batch, the cache grows and columns go from block to block."""
    monkeypatch.setattr(kv_cache, "_FIRST_COLUMNS", 2)
    options = dict(max_new_tokens=60, lengths=[3, 9, 1, 4], group_size=4)
    expected = completions_of(sampler_of(stop_token_ids=[7, 8]), **options)
    num_steps = device.num_runs
    device.num_runs = 0
    sampler = graphed(sampler_of(stop_token_ids=[7, 8]))
    for _ in range(2):
        replayed = completions_of(sampler, **options)
        assert tokens_of(replayed) == tokens_of(expected)
        for one, other in zip(sum(replayed, []), sum(expected, []), strict=True):
            assert one.logps == pytest.approx(other.logps, abs=5e-6)
    assert device.num_runs == len(device.graphs)
    assert device.num_runs + device.num_replays == 2 * num_steps
    assert device.num_replays > num_steps
    assert device.options["capture_error_mode"] == "thread_local"
    assert device.options["pool"] == "pool"


def test_a_step_is_captured_once_a_block_of_columns(device):
    """Columns 5 to 64 for 60 tokens, of which 59 are steps: four blocks of 16."""
    sampler = graphed(sampler_of(stop_token_ids=[]))
    completions_of(sampler, max_new_tokens=60, lengths=[5, 5])
    assert len(device.graphs) == device.num_runs == 4
    assert device.num_replays == 59 - 4


@pytest.mark.parametrize("event", ["growth", "selection"])
def test_a_step_is_captured_anew_on_other_tensors_of_the_cache(device, event):
    decoder = CachedDecoder(build(max_seq_len=512), max_prefill_tokens=64)
    with torch.inference_mode():
        _, cache = decoder.prefill([[1, 2], [3]])
        cache.expand(torch.tensor([0, 1]), 200)
        graph = DecodeGraph(decoder, cache, torch.cuda.Stream())
        tokens = torch.tensor([4, 5])
        for _ in range(3):
            graph.step(tokens)
        assert (len(device.graphs), device.num_replays) == (1, 2)
        if event == "growth":
            cache._copy(None, 2 * cache.capacity)
        else:
            cache.select(torch.tensor([1, 0]))
        graph.step(tokens)
    assert (len(device.graphs), device.num_replays) == (2, 2)


def test_graphs_are_refused_on_another_device():
    with pytest.raises(
        InputError, match="^cuda_graphs: True needs .* CUDA device, not on cpu; set"
    ):
        LocalSampler(build, Letters(), cuda_graphs=True)


def test_graphs_are_refused_for_a_cache_that_grows_on_any_device():
    with pytest.raises(
        InputError, match="^cuda_graphs: True needs a decoder of torchtune: .*False"
    ):
        LocalSampler(build_with_own_cache, Letters(), cuda_graphs=True)


def build_with_own_cache():
    """A decoder with an incremental form of its own, as those of transformers have."""
    decoder = build()
    decoder.incremental = lambda *, max_prefill_tokens: decoder
    return decoder
