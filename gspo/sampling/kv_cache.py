"""The keys and values of rows that are decoded token by token."""

from __future__ import annotations

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
        self.keys = keys  # per layer [N, num_kv_heads, capacity, head_dim]
        self.values = values
        self.capacity = keys[0].shape[2]
        self.num_columns = self.capacity  # that are filled
        self.positions = lengths  # [N] int64, position of the next token
        self.bias: Tensor | None = None  # [N, 1, 1, capacity]
        if ragged:
            self.bias = _gap_bias(lengths, self.capacity, keys[0].dtype)

    def select(self, rows: Tensor | None, room: int = 0) -> None:
        """Keep ``rows``, with at least ``room`` free columns, up to 256.

        Args:
            rows: [M] int64, repeats allowed; None for all.
            room: free columns.
        """
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
        """Make room for one token in every row and return its column."""
        if self.num_columns == self.capacity:
            self.select(None, _MORE_COLUMNS)
        self.num_columns += 1
        return self.num_columns - 1


def _gap_bias(lengths: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    hidden = torch.arange(num_columns, device=lengths.device) >= lengths[:, None]
    bias = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return bias[:, None, None]


def _copy_rows(old: Tensor, rows: Tensor | None, capacity: int, num_columns: int) -> Tensor:
    filled = old[:, :, :num_columns]
    if rows is not None:
        filled = filled.index_select(0, rows)
    new = old.new_empty(filled.shape[0], old.shape[1], capacity, old.shape[3])
    new[:, :, :num_columns] = filled
    return new
