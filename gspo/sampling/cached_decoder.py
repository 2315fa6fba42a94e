"""A torchtune ``TransformerDecoder`` run token by token over a key/value cache, without gradients.

It uses the decoder's own modules and shares its parameters; only the attention is ours. torchtune's cached attention
copies every key and value once per query head at each step and attends over the whole cache, filled or not. Here the
query heads that share a key head become the query length of one attention call, over the filled part only.

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

from gspo.errors import InputError

# Columns added at once, at most. Most completions end long before the longest one allowed.
_MORE_COLUMNS = 256


class KVCache:
    """Keys and values of N rows, with what the next step needs to know about each row.

    A row's prompt lies in columns [0, its length), its completion from column P on, P the longest prompt of the
    batch. ``bias`` hides the columns between. Attention does not depend on the order of columns, so no row is moved.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], lengths: Tensor, ragged: bool
    ) -> None:
        self.keys = keys  # per layer [N, num_kv_heads, capacity, head_dim]
        self.values = values
        self.capacity = self.num_columns = keys[0].shape[2]
        self.positions = lengths  # [N] int64, position of the next token
        self.bias = (
            _gap_bias(lengths, self.capacity, keys[0].dtype) if ragged else None
        )  # [N, 1, 1, capacity]

    def select(self, rows: Tensor | None, room: int = 0) -> None:
        """Keep ``rows`` ([M] int64, repeats allowed; None for all), with at least ``room`` free columns, up to 256."""
        capacity = max(self.capacity, self.num_columns + min(room, _MORE_COLUMNS))
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                tensors[index] = _copy_rows(old, rows, capacity, self.num_columns)
        if rows is not None:
            self.positions = self.positions[rows]
        if self.bias is not None:
            bias = _copy_rows(self.bias.transpose(2, 3), rows, capacity, self.capacity)
            bias[:, :, self.capacity :] = 0.0
            self.bias = bias.transpose(2, 3)
        self.capacity = capacity

    def next_column(self) -> int:
        """Make room for one token in every row; returns its column."""
        if self.num_columns == self.capacity:
            self.select(None, _MORE_COLUMNS)
        self.num_columns += 1
        return self.num_columns - 1


def _gap_bias(lengths: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    hidden = torch.arange(num_columns, device=lengths.device) >= lengths[:, None]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None]


def _copy_rows(old: Tensor, rows: Tensor | None, capacity: int, num_columns: int) -> Tensor:
    filled = old[:, :, :num_columns]
    filled = filled if rows is None else filled.index_select(0, rows)
    new = old.new_empty(filled.shape[0], old.shape[1], capacity, old.shape[3])
    new[:, :, :num_columns] = filled
    return new


class Rotary:
    """The rotation a position embedding module applies, read off the module itself.

    Every rotary embedding turns pairs of features by an angle that grows with the position; families differ in the
    angles and in which features pair up, neighbours or halves. Both are measured by passing unit vectors through.
    """

    def __init__(
        self, module: nn.Module, head_dim: int, max_seq_len: int, device: torch.device
    ) -> None:
        unit = torch.eye(head_dim, device=device)[None, None]
        turned = module(unit, input_pos=torch.ones(1, 1, dtype=torch.int64, device=device))[0, 0]
        # Feature 0 has the largest angle, one radian in position 1: its partner is plain to see.
        self.stride = max(int(turned[0, 1:].abs().argmax()) + 1, 1)
        first = (
            torch.arange(head_dim, device=device) // self.stride % 2 == 0
        )  # the first of each pair
        positions = torch.arange(max_seq_len, device=device)[None]
        from_first, from_second = (
            module(half.float().expand(1, max_seq_len, 1, head_dim), input_pos=positions)[0, :, 0]
            for half in (first, ~first)
        )
        cos = torch.where(first, from_first, from_second)
        sin = torch.where(first, from_second, from_first)  # with its sign
        self.table = torch.stack([cos, sin], 1)  # [max_seq_len, 2, head_dim] float32
        self._check(module, head_dim, max_seq_len)

    def _check(self, module: nn.Module, head_dim: int, max_seq_len: int) -> None:
        device = self.table.device
        probe = torch.linspace(-1.0, 1.0, head_dim, device=device).repeat(1, max_seq_len, 1, 1)
        theirs = module(probe, input_pos=torch.arange(max_seq_len, device=device)[None])[0]
        if not torch.allclose(self.rotate_(probe[0], self.table), theirs, atol=1e-5):
            raise InputError(
                f"model: its position embedding {type(module).__name__} does not rotate pairs of features; "
                "the in-process sampler supports rotary embeddings only. Use a server sampler for this model."
            )

    def rotate_(
        self,
        heads: Tensor,  # [N, num_heads, head_dim], overwritten where it is float32
        table: Tensor,  # [N, 2, head_dim]
    ) -> Tensor:
        """Turn every head by its row of the table."""
        swapped = heads.unflatten(-1, (-1, 2, self.stride)).roll(1, -2).flatten(-3)
        cos, sin = table[:, :1], table[:, 1:]
        return heads.float().mul_(cos).addcmul_(swapped.float(), sin).to(heads.dtype)


class _Layer:
    """One decoder layer in two halves, before and after attention."""

    def __init__(self, layer: TransformerSelfAttentionLayer, rotary: Rotary | None) -> None:
        attn = layer.attn
        self.layer, self.attn, self.rotary = layer, attn, rotary
        self.num_heads, self.num_kv_heads, self.head_dim = (
            attn.num_heads,
            attn.num_kv_heads,
            attn.head_dim,
        )
        self.qkv = _fuse([attn.q_proj, attn.k_proj, attn.v_proj])

    def project(
        self,
        x: Tensor,  # [N, H]
        table: Tensor | None,  # [N, 2, head_dim]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, num_heads, head_dim], keys and values [N, num_kv_heads, head_dim]."""
        heads = F.linear(self.layer.sa_norm(x), *self.qkv).view(x.shape[0], -1, self.head_dim)
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
        q = q.unflatten(1, (self.num_kv_heads, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).reshape(q.shape[0], -1)

    def finish(
        self,
        x: Tensor,  # [N, H]
        attended: Tensor,  # [N, num_heads * head_dim]
    ) -> Tensor:  # [N, H]
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
    """One weight and bias for several projections of one input; their parameters become views of it.

    So an in-place copy into the parameters, as ``load_state_dict`` makes, is all that an update needs.
    """
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.cat([b.detach() for b in biases]) if biases else None
    start = 0
    for linear in linears:
        stop = start + linear.out_features
        linear.weight = nn.Parameter(weight[start:stop], requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias[start:stop], requires_grad=False)
        start = stop
    return weight, bias


class CachedDecoder:
    """Incremental forward of ``decoder``: ``prefill`` the prompts, then ``step`` one token per row.

    Raises:
        InputError: the decoder has parts that the cached attention does not know.
    """

    def __init__(self, decoder: TransformerDecoder, *, max_prefill_tokens: int) -> None:
        _check_supported(decoder)
        self.decoder = decoder
        self.max_prefill_tokens = max_prefill_tokens
        self.head = (
            decoder.output.tied_module if isinstance(decoder.output, TiedLinear) else decoder.output
        )
        rotaries: dict[int, Rotary] = {}
        self.layers = []
        for layer in decoder.layers:
            module = layer.attn.pos_embeddings
            if module is not None and id(module) not in rotaries:
                device = decoder.tok_embeddings.weight.device
                rotaries[id(module)] = Rotary(
                    module, layer.attn.head_dim, decoder.max_seq_len, device
                )
            self.layers.append(_Layer(layer, rotaries.get(id(module))))
        self.rotaries = list(rotaries.values())

    def prefill(self, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
        """Logits [U, V] float32 of the token after each of U prompts, and their cache.

        Prompts are padded on the right, where causal attention cannot see the padding, and go through in chunks of at
        most ``max_prefill_tokens`` tokens, at least one prompt each.
        """
        weight = self.decoder.tok_embeddings.weight
        lengths = torch.tensor([len(p) for p in prompts])
        longest = int(lengths.max())
        shape = (len(prompts), self.layers[0].num_kv_heads, longest, self.layers[0].head_dim)
        keys = [weight.new_empty(shape) for _ in self.layers]
        values = [weight.new_empty(shape) for _ in self.layers]
        padded = [prompt + [0] * (longest - len(prompt)) for prompt in prompts]
        tokens = torch.tensor(padded, device=weight.device)
        cache = KVCache(
            keys, values, lengths.to(weight.device), ragged=bool((lengths != longest).any())
        )
        size = max(self.max_prefill_tokens // longest, 1)
        logits = [
            self._prefill(tokens[i : i + size], cache, i) for i in range(0, len(prompts), size)
        ]
        return torch.cat(logits), cache

    def _prefill(self, tokens: Tensor, cache: KVCache, start: int) -> Tensor:
        rows = slice(start, start + tokens.shape[0])
        num_rows, num_columns = tokens.shape
        x = self.decoder.tok_embeddings(tokens).flatten(0, 1)
        tables: dict[Rotary | None, Tensor] = {
            r: r.table[:num_columns].repeat(num_rows, 1, 1) for r in self.rotaries
        }
        for index, layer in enumerate(self.layers):
            q, k, v = (
                part.unflatten(0, (num_rows, -1)).transpose(1, 2)
                for part in layer.project(x, tables.get(layer.rotary))
            )
            cache.keys[index][rows], cache.values[index][rows] = k, v
            if index + 1 < len(self.layers):
                attended = F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
                )
                x = layer.finish(x, attended.transpose(1, 2).reshape(x.shape[0], -1))
        # After the last layer's keys and values only the last token of each prompt is of use.
        last = torch.arange(num_rows, device=tokens.device), cache.positions[rows] - 1
        bias = None if cache.bias is None else cache.bias[rows]
        attended = layer.attend(q.transpose(1, 2)[last], k, v, bias)
        return self.logits(layer.finish(x.unflatten(0, (num_rows, -1))[last], attended))

    def step(
        self,
        tokens: Tensor,  # [N] int64
        cache: KVCache,
    ) -> Tensor:  # [N, V] float32
        """Append one token to every row; logits of the next."""
        column = cache.next_column()
        filled = column + 1
        x = self.decoder.tok_embeddings(tokens)
        tables: dict[Rotary | None, Tensor] = {r: r.table[cache.positions] for r in self.rotaries}
        bias = None if cache.bias is None else cache.bias[..., :filled]
        for index, layer in enumerate(self.layers):
            keys, values = cache.keys[index], cache.values[index]
            q, keys[:, :, column], values[:, :, column] = layer.project(x, tables.get(layer.rotary))
            x = layer.finish(x, layer.attend(q, keys[:, :, :filled], values[:, :, :filled], bias))
        cache.positions = cache.positions + 1
        return self.logits(x)

    def logits(
        self,
        x: Tensor,  # [N, H]
    ) -> Tensor:  # [N, V] float32
        """Never rounded to bf16: that alone would err by 1e-2 nats."""
        x, weight = self.decoder.norm(x), self.head.weight
        if x.dtype != torch.float32 and x.is_cuda:
            logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        else:
            logits = F.linear(x.float(), weight.float())
        bias = getattr(self.head, "bias", None)
        return logits if bias is None else logits + bias


def _check_supported(decoder: Any) -> None:
    if type(decoder) is not TransformerDecoder:
        raise InputError(
            f"model: the in-process sampler needs a torchtune TransformerDecoder, got {type(decoder).__name__}. "
            "Pass the decoder itself, unsharded and without wrappers."
        )
    output = (
        decoder.output.tied_module if isinstance(decoder.output, TiedLinear) else decoder.output
    )
    parts: list[tuple[Any, tuple[type, ...], str]] = [(output, (nn.Linear, nn.Embedding), "output")]
    for layer in decoder.layers:
        parts.append((layer, (TransformerSelfAttentionLayer,), "layers"))
        attn = getattr(layer, "attn", None)
        parts.append((attn, (MultiHeadAttention,), "attn"))
        for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
            parts.append((getattr(attn, name, None), (nn.Linear,), f"attn.{name}"))
        mlp = getattr(layer, "mlp", None)
        parts.append((mlp, (FeedForward,), "mlp"))
        parts.append((getattr(mlp, "w2", None), (nn.Linear,), "mlp.w2"))
        for name in ("sa_scale", "mlp_scale"):
            parts.append((getattr(layer, name, None), (nn.Identity,), name))
    for part, known, name in parts:
        # A subclass of an embedding only looks up in its own way; one of a projection computes something else.
        if type(part) not in known and not (
            nn.Embedding in known and isinstance(part, nn.Embedding)
        ):
            raise InputError(
                f"model: the in-process sampler does not know {type(part).__name__} as `{name}`; it needs "
                f"{' or '.join(k.__name__ for k in known)}. Merge adapters into the weights, or use a server sampler."
            )
