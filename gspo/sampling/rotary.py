"""The rotation of a position embedding module, measured once and applied from a table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gspo.errors import NO_VALUE, InputError


class Rotary:
    """The rotation that a position embedding module applies, read off the module itself.

    Every rotary embedding turns pairs of features by an angle that grows with the position;
    families differ in the angles and in which features pair up, neighbours or halves. Both are
    measured by passing unit vectors through.

    Args:
        module: a torchtune position embedding.
        head_dim: features of a head.
        max_seq_len: positions of the table.
        device: of the table.

    Raises:
        InputError: The module does something else than rotating pairs.
    """

    def __init__(
        self, module: nn.Module, head_dim: int, max_seq_len: int, device: torch.device
    ) -> None:
        self.stride = _find_stride(module, head_dim, device)
        features = torch.arange(head_dim, device=device)
        is_first = features // self.stride % 2 == 0  # of its pair
        turned_first = _turn_everywhere(module, is_first.float(), max_seq_len)
        turned_second = _turn_everywhere(module, (~is_first).float(), max_seq_len)
        cos = torch.where(is_first, turned_first, turned_second)
        sin = torch.where(is_first, turned_second, turned_first)  # with its sign
        self.table = torch.stack([cos, sin], 1)  # [max_seq_len, 2, head_dim] float32
        self._check(module, head_dim, max_seq_len)

    def _check(self, module: nn.Module, head_dim: int, max_seq_len: int) -> None:
        probe = torch.linspace(-1.0, 1.0, head_dim, device=self.table.device)
        expected = _turn_everywhere(module, probe, max_seq_len)[:, None]
        turned = self.rotate_(probe.repeat(max_seq_len, 1, 1), self.table)
        if not torch.allclose(turned, expected, atol=1e-5):
            raise InputError(
                "build_decoder",
                NO_VALUE,
                f"gives a decoder whose position embedding {type(module).__name__} does not rotate "
                "pairs of features; the in-process sampler supports rotary embeddings only",
                "use a server sampler for this model",
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


def _find_stride(module: nn.Module, head_dim: int, device: torch.device) -> int:
    """Return the distance between the two features of a pair."""
    unit = torch.eye(head_dim, device=device)[None, None]
    position = torch.ones(1, 1, dtype=torch.int64, device=device)
    turned = module(unit, input_pos=position)[0, 0]
    # Feature 0 has the largest angle, one radian in position 1: its partner is plain to see.
    partner = int(turned[0, 1:].abs().argmax()) + 1
    return max(partner, 1)


def _turn_everywhere(
    module: nn.Module,
    features: Tensor,  # [head_dim]
    max_seq_len: int,
) -> Tensor:  # [max_seq_len, head_dim]
    """Return what the module makes of a head in each position."""
    positions = torch.arange(max_seq_len, device=features.device)[None]
    heads = features.expand(1, max_seq_len, 1, -1)
    return module(heads, input_pos=positions)[0, :, 0]
