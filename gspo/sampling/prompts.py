"""Prompts of different lengths in one tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def pad_right(
    prompts: list[list[int]],
) -> tuple[Tensor, Tensor]:  # [U, P] int64, [U] int64, on the CPU
    """Return prompts padded to the longest, and their lengths."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    padded = []
    for prompt in prompts:
        num_missing = longest - len(prompt)
        padding = [0] * num_missing
        padded.append(prompt + padding)
    tokens = torch.tensor(padded)
    token_counts = torch.tensor(lengths)
    return tokens, token_counts


def last_tokens(
    lengths: Tensor,  # [N] int64
) -> tuple[Tensor, Tensor]:  # [N], [N] int64
    """Return the row and the column of each prompt's last token."""
    num_rows = lengths.numel()
    device = lengths.device
    rows = torch.arange(num_rows, device=device)
    columns = lengths - 1
    return rows, columns
