"""The keys and values of rows that are decoded token by token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Attention runs over a multiple of so many columns: the filled ones, and hidden ones behind them.
# On CUDA a new length means a new plan of the attention kernel, and a CUDA graph has one length.
# Elsewhere it is 1: a hidden column costs as much as a filled one.
COLUMN_BLOCK = {"cuda": 256}
# Columns for new tokens at first; they double when they are full. Most completions end long before
# the longest one allowed.
_FIRST_COLUMNS = 256


class KVCache:
    """Keys and values of N rows, with what the next step needs to know about each row.

    A row's prompt lies in columns [0, its length), its completion from column P on, P the longest
    prompt of the batch. ``bias`` hides the columns between, and those that are not filled yet.
    Attention does not depend on the order of columns, so no row is moved.

    What a step does to the tensors, it does in place. Where columns come in blocks, the place
    stands in a tensor too: a step is the same launches for every column of a block, as a CUDA graph
    needs.

    Args:
        keys: per layer [N, num_kv_heads, P, head_dim], filled by the prefill.
        values: the same for values.
        lengths: [N] int64, tokens of each prompt.
        ragged: the prompts differ in length.
        block: a step attends over a multiple of so many columns; 1 for the filled ones only.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        lengths: Tensor,
        ragged: bool,
        *,
        block: int = 1,
    ) -> None:
        first = keys[0]
        capacity = first.shape[2]
        self.keys = keys  # per layer [N, num_kv_heads, capacity, head_dim]
        self.values = values
        self.block = block
        self.num_prompt_columns = capacity
        self.capacity = capacity
        self.max_columns = capacity  # that the longest completion needs
        self.num_columns = capacity  # that are filled
        self.num_copies = 0  # after which the tensors were others
        self.positions = lengths  # [N] int64, position of the next token
        self.column = torch.tensor([capacity], device=first.device)  # [1] int64, the next one
        self.bias: Tensor | None = None  # [N, 1, 1, capacity]
        if ragged or block > 1:
            self.bias = _gap_bias(lengths, capacity, first.dtype)

    @property
    def num_attended(self) -> int:
        """Return the number of columns that a step attends over."""
        return _round_up(self.num_columns, self.block)

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
        num_attended: int,
    ) -> tuple[Tensor, Tensor]:  # [N, num_kv_heads, attended columns, head_dim]
        """Put one token of every row into the next column; return all attended columns."""
        layer_keys = self.keys[layer]
        layer_values = self.values[layer]
        column = num_attended - 1 if self.block == 1 else self.column
        _put(layer_keys, column, keys)
        _put(layer_values, column, values)
        return layer_keys[:, :, :num_attended], layer_values[:, :, :num_attended]

    def bias_of(self, rows: slice) -> Tensor | None:  # [N, 1, 1, capacity]
        """Return the bias of some rows."""
        if self.bias is None:
            return None
        return self.bias[rows]

    def show_column(self, num_attended: int) -> Tensor | None:  # [N, 1, 1, attended columns]
        """Let attention see the next column, and return the bias of the attended columns."""
        if self.bias is None:
            return None
        self.bias.index_fill_(3, self.column, 0.0)
        return self.bias[..., :num_attended]

    def bias_of_window(
        self,
        window: int,
        num_attended: int,
    ) -> Tensor | None:  # [N, 1, 1, attended columns]
        """Return the bias that also hides what is not among a row's last ``window`` tokens.

        The last of them is the one in the column that :meth:`show_column` has shown.
        """
        bias = None if self.bias is None else self.bias[..., :num_attended]
        if self.num_columns <= window:
            return bias
        columns = torch.arange(num_attended, device=self.column.device)
        is_prompt = columns < self.num_prompt_columns
        of_prompt = self.positions[:, None] - columns
        of_completion = self.column - columns
        distances = torch.where(is_prompt, of_prompt, of_completion)
        is_far = (distances >= window)[:, None, None]
        if bias is None:
            bias = torch.zeros_like(is_far, dtype=self.keys[0].dtype)
        return bias.masked_fill(is_far, -math.inf)

    def advance(self) -> None:
        """Go on to the column and the position after."""
        self.positions.add_(1)
        self.column.add_(1)

    def expand(
        self,
        rows: Tensor,  # [M] int64, repeats allowed
        max_new_tokens: int,
    ) -> None:
        """Take these rows of the prompts, with room for new tokens."""
        num_columns = self.num_columns
        num_first = min(max_new_tokens, _FIRST_COLUMNS)
        self.max_columns = _round_up(num_columns + max_new_tokens, self.block)
        capacity = _round_up(num_columns + num_first, self.block)
        self._copy(rows, capacity)

    def select(
        self,
        rows: Tensor,  # [M] int64
    ) -> None:
        """Keep these rows."""
        self._copy(rows, self.capacity)

    def add_column(self) -> None:
        """Make room for one token in every row, and count its column as filled."""
        if self.num_columns == self.capacity:
            doubled = 2 * self.capacity
            capacity = min(doubled, self.max_columns)
            self._copy(None, capacity)
        self.num_columns += 1

    def _copy(self, rows: Tensor | None, capacity: int) -> None:
        """Copy these rows, or all, into tensors with so many columns."""
        num_columns = self.num_columns
        has_hidden = self.block > 1
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = _copy_rows(old, rows, capacity, num_columns)
                if has_hidden:
                    # A hidden column is multiplied by a weight of 0, and 0 * NaN is NaN.
                    new[:, :, num_columns:] = 0.0
                tensors[layer] = new
        if rows is not None:
            self.positions = self.positions[rows]
        if self.bias is not None:
            self.bias = _copy_bias(self.bias, rows, capacity)
        self.capacity = capacity
        self.num_copies += 1


def _put(
    columns: Tensor,  # [N, num_kv_heads, capacity, head_dim]
    column: Tensor | int,  # [1] int64
    new: Tensor,  # [N, num_kv_heads, head_dim]
) -> None:
    if isinstance(column, int):  # half the time of the other on a CPU
        columns[:, :, column] = new
    else:
        columns.index_copy_(2, column, new[:, :, None])


def _round_up(count: int, block: int) -> int:
    """Return the next multiple of ``block``."""
    num_blocks = math.ceil(count / block)
    return num_blocks * block


def _gap_bias(lengths: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    device = lengths.device
    columns = torch.arange(num_columns, device=device)
    limits = lengths[:, None]
    is_hidden = columns >= limits
    bias = torch.zeros_like(is_hidden, dtype=dtype)
    bias.masked_fill_(is_hidden, -math.inf)
    return bias[:, None, None]


def _copy_bias(bias: Tensor, rows: Tensor | None, capacity: int) -> Tensor:
    """Return the bias of ``rows``, with the columns that are new hidden."""
    num_added = capacity - bias.shape[-1]
    selected = bias if rows is None else bias[rows]
    added = (0, num_added)
    return F.pad(selected, added, value=-math.inf)


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
