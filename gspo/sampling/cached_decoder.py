"""A torchtune ``TransformerDecoder`` run token by token over a key/value cache, without gradients.

It uses the decoder's own modules and shares its parameters; only the attention is ours. torchtune's
cached attention copies every key and value once per query head at each step and attends over the
whole cache, filled or not. Here the query heads that share a key head become the query length of
one attention call, over the filled part only: on CUDA up to the next multiple of 256 columns.

Not here: cross-attention, sliding windows, soft caps, adapters. A decoder that has them is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from gspo.errors import NO_VALUE, InputError
from gspo.norm import fuse_norms
from gspo.sampling.kv_cache import COLUMN_BLOCK, KVCache
from gspo.sampling.logits import float32_logits
from gspo.sampling.product import Product
from gspo.sampling.prompts import last_tokens, pad_right
from gspo.sampling.rotary import Rotary

# The table of each rotary for the tokens at hand; layers without a rotary have none.
_Tables = dict[Rotary | None, Tensor]


class _Layer:
    """One decoder layer in two halves, before and after attention."""

    def __init__(
        self,
        index: int,  # of the layer in the decoder and in the cache
        layer: TransformerSelfAttentionLayer,
        rotary: Rotary | None,
    ) -> None:
        attn = layer.attn
        projections = [attn.q_proj, attn.k_proj, attn.v_proj]
        self.index = index
        self.layer = layer
        self.attn = attn
        self.rotary = rotary
        self.num_heads = attn.num_heads
        self.num_kv_heads = attn.num_kv_heads
        self.head_dim = attn.head_dim
        mlp = layer.mlp
        self.qkv = Product(_fuse(projections))
        self.output_proj = Product(attn.output_proj)
        self.mlp_in = Product(mlp.w1)
        self.mlp_factor = None if mlp.w3 is None else Product(mlp.w3)
        self.mlp_out = Product(mlp.w2)

    @property
    def products(self) -> list[Product]:
        """Return the layer's products."""
        products = [self.qkv, self.output_proj, self.mlp_in, self.mlp_out]
        if self.mlp_factor is not None:
            products.append(self.mlp_factor)
        return products

    def project(
        self,
        x: Tensor,  # [N, H]
        table: Tensor | None,  # [N, 2, head_dim]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [N, num_heads, head_dim], keys and values [N, num_kv_heads, head_dim]."""
        attn = self.attn
        layer = self.layer
        rotary = self.rotary
        num_heads = self.num_heads
        num_kv_heads = self.num_kv_heads
        num_rotated = num_heads + num_kv_heads
        normed = layer.sa_norm(x)
        fused = self.qkv(normed)
        head_shape = (-1, self.head_dim)
        heads = fused.unflatten(1, head_shape)
        if rotary is not None and table is not None:
            rotary.rotate_(heads, num_rotated, table)
        sizes = [num_heads, num_kv_heads, num_kv_heads]
        q, k, v = heads.split(sizes, dim=1)
        if attn.q_norm is not None:  # after the rotation, as torchtune has it
            q = attn.q_norm(q)
            k = attn.k_norm(k)
        return q, k, v

    def project_prompts(
        self,
        x: Tensor,  # [N * P, H]
        table: Tensor | None,  # [N * P, 2, head_dim]
        num_rows: int,  # N
    ) -> tuple[Tensor, Tensor, Tensor]:  # [N, num_heads or num_kv_heads, P, head_dim]
        """Return queries, keys and values of whole prompts."""
        q, k, v = self.project(x, table)
        q = _by_head(q, num_rows)
        k = _by_head(k, num_rows)
        v = _by_head(v, num_rows)
        return q, k, v

    def attend(
        self,
        q: Tensor,  # [N, num_heads, head_dim], one token per row
        k: Tensor,  # [N, num_kv_heads, S, head_dim]
        v: Tensor,
        bias: Tensor | None,  # [N, 1, 1, S]
    ) -> Tensor:  # [N, num_heads * head_dim]
        """Attend over the columns given."""
        group_shape = (self.num_kv_heads, -1)
        grouped = q.unflatten(1, group_shape)
        attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias)
        return attended.flatten(1)

    def attend_causally(
        self,
        q: Tensor,  # [N, num_heads, P, head_dim]
        k: Tensor,  # [N, num_kv_heads, P, head_dim]
        v: Tensor,
    ) -> Tensor:  # [N * P, num_heads * head_dim]
        """Attend over whole prompts."""
        is_grouped = self.num_heads != self.num_kv_heads
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        by_token = attended.transpose(1, 2)
        tokens = by_token.flatten(0, 1)
        return tokens.flatten(1)

    def finish(
        self,
        x: Tensor,  # [N, H]
        attended: Tensor,  # [N, num_heads * head_dim]
    ) -> Tensor:  # [N, H]
        """Return the layer's output."""
        layer = self.layer
        x = self.output_proj.add(attended, x)
        normed = layer.mlp_norm(x)
        hidden = self.mlp_in.activate(normed, layer.mlp.activation)
        if self.mlp_factor is not None:
            hidden = self.mlp_factor.multiply_(normed, hidden)
        return self.mlp_out.add(hidden, x)


def _by_head(
    heads: Tensor,  # [N * P, heads, head_dim]
    num_rows: int,  # N
) -> Tensor:  # [N, heads, P, head_dim]
    shape = (num_rows, -1)
    by_row = heads.unflatten(0, shape)
    return by_row.transpose(1, 2)


class _Fused(NamedTuple):
    """Several projections of one input, below each other."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


def _fuse(linears: list[nn.Linear]) -> _Fused:
    """Fuse several projections of one input; their parameters become views of the weight and bias.

    So an in-place copy into the parameters, as ``load_state_dict`` makes, is all that an update
    needs.
    """
    weights = []
    biases = []
    for linear in linears:
        weights.append(linear.weight.detach())
        if linear.bias is not None:
            biases.append(linear.bias.detach())
    weight = torch.cat(weights)
    bias = None
    if biases:
        bias = torch.cat(biases)
    start = 0
    for linear in linears:
        stop = start + linear.out_features
        linear.weight = _frozen_rows(weight, start, stop)
        if bias is not None:
            linear.bias = _frozen_rows(bias, start, stop)
        start = stop
    return _Fused(weight, bias)


def _frozen_rows(fused: Tensor, start: int, stop: int) -> nn.Parameter:
    rows = fused[start:stop]
    return nn.Parameter(rows, requires_grad=False)


class CachedDecoder:
    """An incremental forward: ``prefill`` the prompts, then ``step`` one token per row.

    Args:
        decoder: whose parameters it shares. Its norms are fused, see :mod:`gspo.norm`.
        max_prefill_tokens: prompt tokens that go through at once.

    Raises:
        InputError: The decoder has parts that the cached attention does not know.
    """

    def __init__(self, decoder: TransformerDecoder, *, max_prefill_tokens: int) -> None:
        _check_supported(decoder)
        fuse_norms(decoder)
        rotaries = _measure_rotaries(decoder)
        self.decoder = decoder
        self.max_prefill_tokens = max_prefill_tokens
        weight = decoder.tok_embeddings.weight
        self.column_block = COLUMN_BLOCK.get(weight.device.type, 1)
        self.head = Product(_head_of(decoder))
        self.rotaries = list(rotaries.values())
        self.layers = []
        for index, layer in enumerate(decoder.layers):
            attn = layer.attn
            module = attn.pos_embeddings
            rotary = rotaries.get(module)
            cached_layer = _Layer(index, layer, rotary)
            self.layers.append(cached_layer)

    def _refresh(self) -> None:
        """Pack what has changed of the weights."""
        self.head.refresh()
        for layer in self.layers:
            for product in layer.products:
                product.refresh()

    def prefill(self, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
        """Return logits [U, V] float32 of the token after each of U prompts, and their cache.

        Prompts are padded on the right, where causal attention cannot see the padding, and go
        through in chunks of at most ``max_prefill_tokens`` tokens, at least one prompt each.
        """
        self._refresh()
        tokens, lengths = pad_right(prompts)
        cache = self._empty_cache(lengths)
        num_prompts, longest = tokens.shape
        weight = self.decoder.tok_embeddings.weight
        device = weight.device
        tokens = tokens.to(device)
        num_at_once = self.max_prefill_tokens // longest
        size = max(num_at_once, 1)
        logits = []
        for start in range(0, num_prompts, size):
            stop = start + size
            rows = slice(start, stop)
            chunk = tokens[rows]
            chunk_logits = self._prefill(chunk, cache, rows)
            logits.append(chunk_logits)
        return torch.cat(logits), cache

    def _empty_cache(
        self,
        lengths: Tensor,  # [U] int64, on the CPU
    ) -> KVCache:
        """Return a cache with a column for each token of the longest prompt, to be filled."""
        num_rows = lengths.numel()
        longest = int(lengths.max())
        is_shorter = lengths != longest
        is_ragged = bool(is_shorter.any())
        keys = self._empty_columns(num_rows, longest)
        values = self._empty_columns(num_rows, longest)
        device = keys[0].device
        lengths = lengths.to(device)
        return KVCache(keys, values, lengths, is_ragged, block=self.column_block)

    def _empty_columns(self, num_rows: int, num_columns: int) -> list[Tensor]:
        """Return a tensor [N, num_kv_heads, columns, head_dim] for each layer."""
        weight = self.decoder.tok_embeddings.weight
        columns = []
        for layer in self.layers:
            shape = (num_rows, layer.num_kv_heads, num_columns, layer.head_dim)
            empty = weight.new_empty(shape)
            columns.append(empty)
        return columns

    def _prefill(
        self,
        tokens: Tensor,  # [N, P] int64
        cache: KVCache,
        rows: slice,  # of the cache, for these N; it may end behind the last
    ) -> Tensor:  # [N, V] float32
        num_rows, num_columns = tokens.shape
        tables = self._prompt_tables(num_rows, num_columns)
        embedding = self.decoder.tok_embeddings
        x = embedding(tokens).flatten(0, 1)
        last_layer = self.layers[-1]
        for layer in self.layers:
            table = tables.get(layer.rotary)
            q, k, v = layer.project_prompts(x, table, num_rows)
            cache.fill(layer.index, rows, k, v)
            if layer is last_layer:
                break
            x = layer.finish(x, layer.attend_causally(q, k, v))
        # After the last layer's keys and values only the last token of each prompt is of use.
        lengths = cache.positions[rows]
        bias = cache.bias_of(rows)
        by_row = x.unflatten(0, tokens.shape)
        by_token = q.transpose(1, 2)
        last = last_tokens(lengths)
        last_x = by_row[last]
        last_q = by_token[last]
        attended = last_layer.attend(last_q, k, v, bias)
        last_x = last_layer.finish(last_x, attended)
        return self.logits(last_x)

    def _prompt_tables(self, num_rows: int, num_columns: int) -> _Tables:  # [N * P, 2, head_dim]
        """Return the tables for whole prompts."""
        tables: _Tables = {}
        for rotary in self.rotaries:
            table = rotary.table[:num_columns]
            tables[rotary] = table.repeat(num_rows, 1, 1)
        return tables

    def _tables_at(
        self,
        positions: Tensor,  # [N] int64
    ) -> _Tables:  # [N, 2, head_dim]
        """Return the tables for one token of each row."""
        tables: _Tables = {}
        for rotary in self.rotaries:
            tables[rotary] = rotary.table[positions]
        return tables

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
        tables = self._tables_at(cache.positions)
        embedding = self.decoder.tok_embeddings
        x = embedding(tokens)
        for layer in self.layers:
            table = tables.get(layer.rotary)
            q, k, v = layer.project(x, table)
            keys, values = cache.append(layer.index, k, v, num_attended)
            attended = layer.attend(q, keys, values, bias)
            x = layer.finish(x, attended)
        cache.advance()
        return self.logits(x)

    def logits(
        self,
        x: Tensor,  # [N, H]
    ) -> Tensor:  # [N, V] float32
        """Return the logits of the next tokens."""
        normed = self.decoder.norm(x)
        return float32_logits(normed, self.head)


def _head_of(decoder: TransformerDecoder) -> Any:
    """Return the module with the output weight, the token embedding where that is tied."""
    output = decoder.output
    if isinstance(output, TiedLinear):
        return output.tied_module
    return output


def _measure_rotaries(decoder: TransformerDecoder) -> dict[nn.Module, Rotary]:
    """Measure each position embedding once, however many layers share it."""
    device = decoder.tok_embeddings.weight.device
    rotaries: dict[nn.Module, Rotary] = {}
    for layer in decoder.layers:
        attn = layer.attn
        module = attn.pos_embeddings
        if module is None or module in rotaries:
            continue
        rotaries[module] = Rotary(module, attn.head_dim, decoder.max_seq_len, device)
    return rotaries


def _check_supported(decoder: Any) -> None:
    if type(decoder) is not TransformerDecoder:
        raise InputError(
            "build_decoder",
            NO_VALUE,
            f"gives a {type(decoder).__name__}; the in-process sampler needs a torchtune "
            "TransformerDecoder",
            "give the decoder itself, unsharded and without wrappers",
        )
    head = _head_of(decoder)
    _check_part(head, "output", nn.Linear, nn.Embedding)
    for layer in decoder.layers:
        _check_layer(layer)


def _check_layer(layer: Any) -> None:
    _check_part(layer, "layers", TransformerSelfAttentionLayer)
    attn = layer.attn
    _check_part(attn, "attn", MultiHeadAttention)
    for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
        projection = getattr(attn, name)
        _check_part(projection, f"attn.{name}", nn.Linear)
    mlp = layer.mlp
    _check_part(mlp, "mlp", FeedForward)
    down_proj = mlp.w2
    _check_part(down_proj, "mlp.w2", nn.Linear)
    for name in ("sa_scale", "mlp_scale"):
        scale = getattr(layer, name)
        _check_part(scale, name, nn.Identity)


def _check_part(part: Any, name: str, *known: type) -> None:
    # A subclass of an embedding only looks up in its own way; one of a projection computes
    # something else.
    may_be_embedding = nn.Embedding in known
    is_embedding = may_be_embedding and isinstance(part, nn.Embedding)
    is_known = type(part) in known
    if is_known or is_embedding:
        return
    names = " or ".join(cls.__name__ for cls in known)
    raise InputError(
        "build_decoder",
        NO_VALUE,
        f"gives a decoder with {type(part).__name__} as `{name}`, which the in-process sampler "
        f"does not know; it needs {names}",
        "merge adapters into the weights, or use a server sampler",
    )
