"""The keys and values of rows that are decoded token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Columns added at once, at most. Most completions end long before the longest one allowed.
_MORE_COLUMNS = 256


class KVCache:
    """Keys and values of N rows, with what the next step needs to know about each row.

    A row's prompt lies in columns [0, its length), its completion from column P on, P the longest
    prompt of the batch. ``bias`` hides the columns between. Attention does not depend on the order
    of columns, so no row is moved.

    Args:
        keys: per layer [N, num_kv_heads, P, head_dim], filled by the prefill.
        values: the same for values.
        lengths: [N] int64, tokens of each prompt.
        ragged: the prompts differ in length.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], lengths: Tensor, ragged: bool
    ) -> None:
        first = keys[0]
        capacity = first.shape[2]
        self.keys = keys  # per layer [N, num_kv_heads, capacity, head_dim]
        self.values = values
        self.capacity = capacity
        self.num_columns = capacity  # that are filled
        self.positions = lengths  # [N] int64, position of the next token
        self.bias: Tensor | None = None  # [N, 1, 1, capacity]
        if ragged:
            self.bias = _gap_bias(lengths, capacity, first.dtype)

    def fill(self, layer: int, rows: slice, keys: Tensor, values: Tensor) -> None:
        """Put the keys and values of whole prompts into some rows of a layer."""
        layer_keys = self.keys[layer]
        layer_values = self.values[layer]
        layer_keys[rows] = keys
        layer_values[rows] = values

    def append(
        self,
        layer: int,
        keys: Tensor,  # [N, num_kv_heads, head_dim]
        values: Tensor,
    ) -> tuple[Tensor, Tensor]:  # [N, num_kv_heads, filled columns, head_dim]
        """Put one token of every row into the newest column; return all filled columns."""
        num_filled = self.num_columns
        layer_keys = self.keys[layer]
        layer_values = self.values[layer]
        filled_keys = _put_last(layer_keys, num_filled, keys)
        filled_values = _put_last(layer_values, num_filled, values)
        return filled_keys, filled_values

    def bias_of(self, rows: slice) -> Tensor | None:  # [N, 1, 1, capacity]
        """Return the bias of some rows."""
        if self.bias is None:
            return None
        return self.bias[rows]

    def filled_bias(self) -> Tensor | None:  # [N, 1, 1, filled columns]
        """Return the bias of the filled columns."""
        if self.bias is None:
            return None
        num_filled = self.num_columns
        return self.bias[..., :num_filled]

    def select(self, rows: Tensor | None, room: int = 0) -> None:
        """Keep ``rows``, with at least ``room`` free columns, up to 256.

        Args:
            rows: [M] int64, repeats allowed; None for all.
            room: free columns.
        """
        num_columns = self.num_columns
        num_more = min(room, _MORE_COLUMNS)
        num_needed = num_columns + num_more
        capacity = max(self.capacity, num_needed)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = _copy_rows(old, rows, capacity, num_columns)
                tensors[layer] = new
        if rows is not None:
            self.positions = self.positions[rows]
        bias = self.bias
        if bias is not None:
            self.bias = _copy_bias(bias, rows, capacity)
        self.capacity = capacity

    def add_column(self) -> None:
        """Make room for one token in every row, and count its column as filled."""
        if self.num_columns == self.capacity:
            self.select(None, _MORE_COLUMNS)
        self.num_columns += 1


def _gap_bias(lengths: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    device = lengths.device
    columns = torch.arange(num_columns, device=device)
    limits = lengths[:, None]
    is_hidden = columns >= limits
    bias = torch.zeros_like(is_hidden, dtype=dtype)
    bias.masked_fill_(is_hidden, -math.inf)
    return bias[:, None, None]


def _put_last(
    columns: Tensor,  # [N, num_kv_heads, capacity, head_dim]
    num_filled: int,
    new: Tensor,  # [N, num_kv_heads, head_dim]
) -> Tensor:  # [N, num_kv_heads, num_filled, head_dim]
    """Put ``new`` into the last filled column and return the filled ones."""
    last = num_filled - 1
    filled = columns[:, :, :num_filled]
    filled[:, :, last] = new
    return filled


def _copy_bias(bias: Tensor, rows: Tensor | None, capacity: int) -> Tensor:
    """Return the bias of ``rows``, with 0 for the columns that are new."""
    old_capacity = bias.shape[-1]
    by_column = bias.transpose(2, 3)
    new = _copy_rows(by_column, rows, capacity, old_capacity)
    added = new[:, :, old_capacity:]
    added.zero_()
    return new.transpose(2, 3)


def _copy_rows(old: Tensor, rows: Tensor | None, capacity: int, num_columns: int) -> Tensor:
    filled = old[:, :, :num_columns]
    if rows is None:
        selected = filled
    else:
        selected = filled.index_select(0, rows)
    num_rows, num_heads, _, head_dim = selected.shape
    shape = (num_rows, num_heads, capacity, head_dim)
    new = old.new_empty(shape)
    new[:, :, :num_columns] = selected
    return new
