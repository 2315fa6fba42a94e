"""A torchtune ``TransformerDecoder`` run token by token over a key/value cache, without gradients.

It uses the decoder's own modules and shares its parameters; only the attention is ours. torchtune's
cached attention copies every key and value once per query head at each step and attends over the
whole cache, filled or not. Here the query heads that share a key head become the query length of
one attention call, over the filled part only.

Not here: cross-attention, sliding windows, soft caps, adapters. A decoder that has them is refused.
"""

from __future__ import annotations

from typing import Any

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
from gspo.sampling.kv_cache import KVCache
from gspo.sampling.rotary import Rotary


class _Layer:
    """One decoder layer in two halves, before and after attention."""

    def __init__(self, layer: TransformerSelfAttentionLayer, rotary: Rotary | None) -> None:
        attn = layer.attn
        self.layer = layer
        self.attn = attn
        self.rotary = rotary
        self.num_heads = attn.num_heads
        self.num_kv_heads = attn.num_kv_heads
        self.head_dim = attn.head_dim
        self.qkv = _fuse([attn.q_proj, attn.k_proj, attn.v_proj])

    def project(
        self,
        x: Tensor,  # [N, H]
        table: Tensor | None,  # [N, 2, head_dim]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [N, num_heads, head_dim], keys and values [N, num_kv_heads, head_dim]."""
        weight, bias = self.qkv
        fused = F.linear(self.layer.sa_norm(x), weight, bias)
        heads = fused.view(x.shape[0], -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        qk, v = heads[:, :num_rotated], heads[:, num_rotated:]
        if self.rotary is not None and table is not None:
            qk = self.rotary.rotate_(qk, table)
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        if self.attn.q_norm is not None:  # after the rotation, as torchtune has it
            q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        return q, k, v

    def attend(
        self,
        q: Tensor,  # [N, num_heads, head_dim], one token per row
        k: Tensor,  # [N, num_kv_heads, S, head_dim]
        v: Tensor,
        bias: Tensor | None,  # [N, 1, 1, S]
    ) -> Tensor:  # [N, num_heads * head_dim]
        """Attend over the filled columns."""
        grouped = q.unflatten(1, (self.num_kv_heads, -1))
        attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias)
        return attended.reshape(q.shape[0], -1)

    def attend_causally(
        self,
        q: Tensor,  # [N, num_heads, P, head_dim]
        k: Tensor,  # [N, num_kv_heads, P, head_dim]
        v: Tensor,
    ) -> Tensor:  # [N * P, num_heads * head_dim]
        """Attend over whole prompts."""
        is_grouped = q.shape[1] != k.shape[1]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        return attended.transpose(1, 2).flatten(0, 1).flatten(1)

    def finish(
        self,
        x: Tensor,  # [N, H]
        attended: Tensor,  # [N, num_heads * head_dim]
    ) -> Tensor:  # [N, H]
        """Return the layer's output."""
        x = _add_linear(x, attended, self.attn.output_proj)
        mlp, normed = self.layer.mlp, self.layer.mlp_norm(x)
        hidden = mlp.activation(mlp.w1(normed))
        if mlp.w3 is not None:
            hidden = hidden.mul_(mlp.w3(normed))
        return _add_linear(x, hidden, mlp.w2)


def _add_linear(x: Tensor, inputs: Tensor, linear: nn.Linear) -> Tensor:
    added = torch.addmm(x, inputs, linear.weight.t())
    return added if linear.bias is None else added.add_(linear.bias)


def _fuse(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Fuse several projections of one input; their parameters become views of the weight and bias.

    So an in-place copy into the parameters, as ``load_state_dict`` makes, is all that an update
    needs.
    """
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    start = 0
    for linear in linears:
        rows = slice(start, start + linear.out_features)
        linear.weight = nn.Parameter(weight[rows], requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias[rows], requires_grad=False)
        start = rows.stop
    return weight, bias


class CachedDecoder:
    """An incremental forward: ``prefill`` the prompts, then ``step`` one token per row.

    Args:
        decoder: whose parameters it shares.
        max_prefill_tokens: prompt tokens that go through at once.

    Raises:
        InputError: The decoder has parts that the cached attention does not know.
    """

    def __init__(self, decoder: TransformerDecoder, *, max_prefill_tokens: int) -> None:
        _check_supported(decoder)
        self.decoder = decoder
        self.max_prefill_tokens = max_prefill_tokens
        self.head = _head_of(decoder)
        rotaries: dict[int, Rotary] = {}
        self.layers = []
        for layer in decoder.layers:
            module = layer.attn.pos_embeddings
            if module is not None and id(module) not in rotaries:
                rotaries[id(module)] = _rotary_of(module, layer.attn.head_dim, decoder)
            self.layers.append(_Layer(layer, rotaries.get(id(module))))
        self.rotaries = list(rotaries.values())

    def prefill(self, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
        """Return logits [U, V] float32 of the token after each of U prompts, and their cache.

        Prompts are padded on the right, where causal attention cannot see the padding, and go
        through in chunks of at most ``max_prefill_tokens`` tokens, at least one prompt each.
        """
        device = self.decoder.tok_embeddings.weight.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
        tokens = torch.tensor(padded, device=device)
        is_ragged = bool((lengths != longest).any())
        shape = (len(prompts), longest)
        keys, values = self._empty_columns(*shape), self._empty_columns(*shape)
        cache = KVCache(keys, values, lengths.to(device), is_ragged)
        size = max(self.max_prefill_tokens // longest, 1)
        logits = []
        for start in range(0, len(prompts), size):
            rows = slice(start, start + size)
            logits.append(self._prefill(tokens[rows], cache, rows))
        return torch.cat(logits), cache

    def _empty_columns(self, num_rows: int, num_columns: int) -> list[Tensor]:
        """Return a tensor [N, num_kv_heads, columns, head_dim] for each layer."""
        weight, first = self.decoder.tok_embeddings.weight, self.layers[0]
        shape = (num_rows, first.num_kv_heads, num_columns, first.head_dim)
        return [weight.new_empty(shape) for _ in self.layers]

    def _prefill(
        self,
        tokens: Tensor,  # [N, P] int64
        cache: KVCache,
        rows: slice,  # of the cache, for these N; it may end behind the last
    ) -> Tensor:  # [N, V] float32
        num_rows, num_columns = tokens.shape
        x = self.decoder.tok_embeddings(tokens).flatten(0, 1)
        tables: dict[Rotary | None, Tensor] = {}
        for rotary in self.rotaries:
            tables[rotary] = rotary.table[:num_columns].repeat(num_rows, 1, 1)
        last_index = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            projected = layer.project(x, tables.get(layer.rotary))
            q, k, v = (heads.unflatten(0, (num_rows, -1)).transpose(1, 2) for heads in projected)
            cache.keys[index][rows] = k
            cache.values[index][rows] = v
            if index < last_index:
                x = layer.finish(x, layer.attend_causally(q, k, v))
        # After the last layer's keys and values only the last token of each prompt is of use.
        last = torch.arange(num_rows, device=tokens.device), cache.positions[rows] - 1
        bias = None if cache.bias is None else cache.bias[rows]
        attended = layer.attend(q.transpose(1, 2)[last], k, v, bias)
        last_x = x.unflatten(0, (num_rows, -1))[last]
        return self.logits(layer.finish(last_x, attended))

    def step(
        self,
        tokens: Tensor,  # [N] int64
        cache: KVCache,
    ) -> Tensor:  # [N, V] float32
        """Append one token to every row and return the logits of the next."""
        column = cache.next_column()
        filled = column + 1
        x = self.decoder.tok_embeddings(tokens)
        tables: dict[Rotary | None, Tensor] = {}
        for rotary in self.rotaries:
            tables[rotary] = rotary.table[cache.positions]
        bias = None if cache.bias is None else cache.bias[..., :filled]
        for index, layer in enumerate(self.layers):
            keys, values = cache.keys[index], cache.values[index]
            q, k, v = layer.project(x, tables.get(layer.rotary))
            keys[:, :, column] = k
            values[:, :, column] = v
            attended = layer.attend(q, keys[:, :, :filled], values[:, :, :filled], bias)
            x = layer.finish(x, attended)
        cache.positions = cache.positions + 1
        return self.logits(x)

    def logits(
        self,
        x: Tensor,  # [N, H]
    ) -> Tensor:  # [N, V] float32
        """Return logits that were never rounded to bf16: that alone would err by 1e-2 nats."""
        x, weight = self.decoder.norm(x), self.head.weight
        if x.dtype != torch.float32 and x.is_cuda:
            logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        else:
            logits = F.linear(x.float(), weight.float())
        bias = getattr(self.head, "bias", None)
        return logits if bias is None else logits + bias


def _head_of(decoder: TransformerDecoder) -> Any:
    """Return the module with the output weight, the token embedding where that is tied."""
    output = decoder.output
    return output.tied_module if isinstance(output, TiedLinear) else output


def _rotary_of(module: nn.Module, head_dim: int, decoder: TransformerDecoder) -> Rotary:
    device = decoder.tok_embeddings.weight.device
    return Rotary(module, head_dim, decoder.max_seq_len, device)


def _check_supported(decoder: Any) -> None:
    if type(decoder) is not TransformerDecoder:
        raise InputError(
            "build_decoder",
            NO_VALUE,
            f"gives a {type(decoder).__name__}; the in-process sampler needs a torchtune "
            "TransformerDecoder",
            "give the decoder itself, unsharded and without wrappers",
        )
    _check_part(_head_of(decoder), "output", nn.Linear, nn.Embedding)
    for layer in decoder.layers:
        _check_layer(layer)


def _check_layer(layer: Any) -> None:
    _check_part(layer, "layers", TransformerSelfAttentionLayer)
    _check_part(layer.attn, "attn", MultiHeadAttention)
    for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
        _check_part(getattr(layer.attn, name), f"attn.{name}", nn.Linear)
    _check_part(layer.mlp, "mlp", FeedForward)
    _check_part(layer.mlp.w2, "mlp.w2", nn.Linear)
    for name in ("sa_scale", "mlp_scale"):
        _check_part(getattr(layer, name), name, nn.Identity)


def _check_part(part: Any, name: str, *known: type) -> None:
    # A subclass of an embedding only looks up in its own way; one of a projection computes
    # something else.
    is_embedding = nn.Embedding in known and isinstance(part, nn.Embedding)
    if type(part) in known or is_embedding:
        return
    names = " or ".join(cls.__name__ for cls in known)
    raise InputError(
        "build_decoder",
        NO_VALUE,
        f"gives a decoder with {type(part).__name__} as `{name}`, which the in-process sampler "
        f"does not know; it needs {names}",
        "merge adapters into the weights, or use a server sampler",
    )
