"""A transformers model run token by token over our key/value cache, without gradients.

It has the form of :class:`gspo.sampling.cached_decoder.CachedDecoder`, for the in-process sampler.
The model's own modules run; their attention is given the keys and values of all tokens so far, and
their linear layers multiply with packed weights. The library's own cache is not used: it copies all
of itself at every step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspo.sampling.kv_cache import COLUMN_BLOCK, KVCache
from gspo.sampling.logits import float32_logits
from gspo.sampling.product import Product
from gspo.sampling.prompts import last_tokens, pad_right


class IncrementalCausalLM:
    """An incremental forward: ``prefill`` the prompts, then ``step`` one token per row.

    Args:
        decoder: made by :func:`gspo.models.huggingface.causal_lm`, whose parameters it shares. Its
            layers attend over the cache from now on, so it is no policy any more.
        max_prefill_tokens: prompt tokens that go through at once.
    """

    def __init__(self, decoder: Any, *, max_prefill_tokens: int) -> None:
        self.decoder = decoder
        self.max_prefill_tokens = max_prefill_tokens
        self.column_block = COLUMN_BLOCK.get(self._device.type, 1)
        self.head = Product(decoder.output)
        self._products = _replace_products(decoder)

    def prefill(self, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
        """Return logits [U, V] float32 of the token after each of U prompts, and their cache.

        Prompts are padded on the right, where causal attention cannot see the padding, and go
        through in chunks of at most ``max_prefill_tokens`` tokens, at least one prompt each.
        """
        self._refresh()
        tokens, lengths = pad_right(prompts)
        num_prompts, longest = tokens.shape
        is_ragged = bool((lengths != longest).any())
        device = self._device
        tokens = tokens.to(device)
        lengths = lengths.to(device)
        size = max(self.max_prefill_tokens // longest, 1)
        filled = _Filled()
        logits = []
        for start in range(0, num_prompts, size):
            rows = slice(start, start + size)
            chunk_logits = self._prefill(tokens[rows], lengths[rows], filled)
            logits.append(chunk_logits)
        cache = KVCache(
            filled.joined(filled.keys),
            filled.joined(filled.values),
            lengths,
            is_ragged,
            block=self.column_block,
        )
        return torch.cat(logits), cache

    def _prefill(
        self,
        tokens: Tensor,  # [N, P] int64
        lengths: Tensor,  # [N] int64
        filled: _Filled,
    ) -> Tensor:  # [N, V] float32
        num_rows, num_columns = tokens.shape
        columns = torch.arange(num_columns, device=tokens.device)
        masks = {window: _mask_of(columns, window) for window in self.decoder.windows}
        positions = columns.expand(num_rows, -1)
        self.decoder.use_attention(_attend_to_prompts)
        self.decoder.remember_keys(filled.add)
        hidden = self.decoder(tokens, mask=masks, input_pos=positions)
        return self._logits(hidden[last_tokens(lengths)])

    def step(
        self,
        tokens: Tensor,  # [N] int64
        cache: KVCache,
    ) -> Tensor:  # [N, V] float32
        """Append one token to every row and return the logits of the next."""
        cache.add_column()
        return self.decode(tokens, cache, cache.num_attended)

    def decode(
        self,
        tokens: Tensor,  # [N] int64
        cache: KVCache,
        num_attended: int,  # columns of it
    ) -> Tensor:  # [N, V] float32
        """Do the part of a step that is on the device, the same launches for a block of columns."""
        bias = cache.show_column(num_attended)
        masks = {}
        for window in self.decoder.windows:
            is_full = window is None
            masks[window] = bias if is_full else cache.bias_of_window(window, num_attended)

        def append(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return cache.append(layer, keys.squeeze(2), values.squeeze(2), num_attended)

        self.decoder.use_attention(_attend_to_cache)
        self.decoder.remember_keys(append)
        positions = cache.positions[:, None]
        hidden = self.decoder(tokens[:, None], mask=masks, input_pos=positions)
        cache.advance()
        return self._logits(hidden[:, -1])

    @property
    def _device(self) -> torch.device:
        return self.decoder.tok_embeddings.weight.device

    def _refresh(self) -> None:
        """Pack what has changed of the weights."""
        self.head.refresh()
        for product in self._products:
            product.refresh()

    def _logits(
        self,
        hidden: Tensor,  # [N, H]
    ) -> Tensor:  # [N, V] float32
        logits = float32_logits(hidden, self.head)
        form = self.decoder.head_form
        if form.divisor != 1.0:
            logits = logits / form.divisor
        if form.softcap is not None:
            logits = form.softcap * torch.tanh(logits / form.softcap)
        return logits


class _Filled:
    """The keys and values of each layer for chunk after chunk of prompts."""

    def __init__(self) -> None:
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}

    def add(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take a chunk [N, key heads, P, head_dim] of a layer, and return it."""
        self.keys.setdefault(layer, []).append(keys)
        self.values.setdefault(layer, []).append(values)
        return keys, values

    def joined(self, chunks: dict[int, list[Tensor]]) -> list[Tensor]:
        """Return a tensor [U, key heads, P, head_dim] for each layer."""
        return [torch.cat(chunks[layer]) for layer in sorted(chunks)]


def _replace_products(decoder: Any) -> list[Product]:
    """Let the linear layers of a decoder multiply with packed weights; return their products."""
    products = []
    modules: Any = decoder.base_model.modules()
    for module in modules:
        kind = type(module)
        if kind is nn.Linear:
            product = Product(module)
            module.forward = product.__call__
            products.append(product)
    return products


def _mask_of(
    columns: Tensor,  # [P] int64
    window: int | None,
) -> Tensor | None:  # [P, P] bool
    """Return which earlier columns are within the window; None for all of them."""
    if window is None or window >= columns.numel():
        return None
    distances = columns[:, None] - columns
    return (distances >= 0) & (distances < window)


def _attend_to_prompts(
    q: Tensor,  # [N, heads, P, head_dim]
    k: Tensor,  # [N, key heads, P, head_dim]
    v: Tensor,
    *,
    mask: Tensor | None,  # [P, P] bool
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
) -> Tensor:  # [N, heads, P, head_dim]
    """Attend over whole prompts."""
    is_grouped = q.shape[1] != k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
        )
    repeats = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(repeats, 1)
    v = v.repeat_interleave(repeats, 1)
    if mask is None:
        num_columns = q.shape[2]
        mask = torch.ones(num_columns, num_columns, dtype=torch.bool, device=q.device).tril()
    bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    return _attend_softcapped(q, k, v, bias, scale, softcap)


def _attend_to_cache(
    q: Tensor,  # [N, heads, 1, head_dim]
    k: Tensor,  # [N, key heads, S, head_dim]
    v: Tensor,
    *,
    mask: Tensor | None,  # [N, 1, 1, S]
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
) -> Tensor:  # [N, heads, 1, head_dim]
    """Attend over the columns given; the heads that share a key head are its queries."""
    group_shape = (k.shape[1], -1)
    grouped = q.squeeze(2).unflatten(1, group_shape)
    if softcap is None:
        attended = F.scaled_dot_product_attention(grouped, k, v, mask, scale=scale)
    else:
        attended = _attend_softcapped(grouped, k, v, mask, scale, softcap)
    return attended.flatten(1, 2)[:, :, None]


def _attend_softcapped(
    q: Tensor,  # [N, heads, queries, head_dim]
    k: Tensor,  # [N, heads, keys, head_dim]
    v: Tensor,
    bias: Tensor | None,
    scale: float | None,
    softcap: float,
) -> Tensor:
    """Attend with all scores at hand, since torch's fused attention has no softcap."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-1, -2) * factor
    scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v
