"""Decode steps replayed from CUDA graphs.

A step is some 16 launches a layer, each a few microseconds of the host's time, and so often more
than the device's. Replaying a graph is one launch. Not measured yet: no GPU has run it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gspo.sampling.cached_decoder import CachedDecoder
from gspo.sampling.kv_cache import KVCache


@dataclass(frozen=True)
class _Captured:
    """A captured step and the tensors that it reads and writes, beside those of the cache."""

    key: tuple[int, int]  # copies of the cache so far, attended columns
    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # [N] int64
    logits: Tensor  # [N, V] float32


class DecodeGraph:
    """The steps of one cache, captured anew for each block of columns and each copy of the cache.

    The first step on a block runs as it is, which warms up the libraries. Then the step is
    captured, which computes nothing, and the block's other steps replay it. Graphs share a pool of
    memory, which goes with this object.

    Args:
        decoder: runs the steps.
        cache: of the rows to decode.
        stream: captures; not the default stream. One for all caches, since cuBLAS keeps a workspace
            for each stream.
    """

    def __init__(self, decoder: CachedDecoder, cache: KVCache, stream: torch.cuda.Stream) -> None:
        self._decoder = decoder
        self._cache = cache
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: _Captured | None = None

    def step(
        self,
        tokens: Tensor,  # [N] int64
    ) -> Tensor:  # [N, V] float32, overwritten by the next step
        """Append one token to every row and return the logits of the next."""
        cache = self._cache
        cache.add_column()
        key = (cache.num_copies, cache.num_attended)
        captured = self._captured
        if captured is None or captured.key != key:
            logits = self._run_once(tokens)
            # The graph before goes only now: without any the pool would end.
            self._captured = self._capture(tokens, key)
            return logits
        captured.tokens.copy_(tokens)
        captured.graph.replay()
        return captured.logits

    def _run_once(self, tokens: Tensor) -> Tensor:
        """Run a step on the stream of the capture."""
        stream = self._stream
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            logits = self._decode(tokens)
        current.wait_stream(stream)
        return logits

    def _capture(self, tokens: Tensor, key: tuple[int, int]) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        tokens = tokens.clone()
        # Another thread may use the device meanwhile: the trainer's, with prefetch.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            logits = self._decode(tokens)
        return _Captured(key, graph, tokens, logits)

    def _decode(self, tokens: Tensor) -> Tensor:
        cache = self._cache
        return self._decoder.decode(tokens, cache, cache.num_attended)
