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
        stride = _find_stride(module, head_dim, device)
        self.stride = stride
        features = torch.arange(head_dim, device=device)
        halves = features // stride
        sides = halves % 2
        is_first = sides == 0  # of its pair
        firsts = is_first.float()
        seconds = 1.0 - firsts
        turned_first = _turn_everywhere(module, firsts, max_seq_len)
        turned_second = _turn_everywhere(module, seconds, max_seq_len)
        cos = torch.where(is_first, turned_first, turned_second)
        sin = torch.where(is_first, turned_second, turned_first)  # with its sign
        columns = [cos, sin]
        table = torch.stack(columns, 1)
        self.table = table  # [max_seq_len, 2, head_dim] float32
        self._check(module, head_dim, max_seq_len)

    def _check(self, module: nn.Module, head_dim: int, max_seq_len: int) -> None:
        device = self.table.device
        probe = torch.linspace(-1.0, 1.0, head_dim, device=device)
        expected = _turn_everywhere(module, probe, max_seq_len)
        probes = probe.repeat(max_seq_len, 1, 1)
        self.rotate_(probes, 1, self.table)
        turned = probes.squeeze(1)
        is_rotation = torch.allclose(turned, expected, atol=1e-5)
        if not is_rotation:
            module_name = type(module).__name__
            raise InputError(
                "build_decoder",
                NO_VALUE,
                f"gives a decoder whose position embedding {module_name} does not rotate "
                "pairs of features; the in-process sampler supports rotary embeddings only",
                "use a server sampler for this model",
            )

    def rotate_(
        self,
        heads: Tensor,  # [N, num_heads, head_dim]
        num_rotated: int,  # the first so many heads are overwritten, in float32 until the end
        table: Tensor,  # [N, 2, head_dim]
    ) -> None:
        """Turn the first heads by their row of the table."""
        stride = self.stride
        pair_shape = (-1, 2, stride)
        pairs = heads.unflatten(-1, pair_shape)
        # All heads, since CUDA copies a slice before it rolls it.
        swapped_pairs = pairs.roll(1, -2)
        swapped = swapped_pairs.flatten(-3)
        rotated = heads[:, :num_rotated]
        partners = swapped[:, :num_rotated]
        cos, sin = table.split(1, dim=1)
        turned = rotated * cos
        torch.addcmul(turned, partners, sin, out=rotated)


def _find_stride(module: nn.Module, head_dim: int, device: torch.device) -> int:
    """Return the distance between the two features of a pair."""
    first = torch.zeros(head_dim, device=device)
    first[0] = 1.0
    turned = _turn_everywhere(module, first, 2)
    # Feature 0 has the largest angle, one radian in position 1: its partner is plain to see.
    in_position_1 = turned[1]
    sizes = in_position_1.abs()
    sizes[0] = 0.0
    largest = sizes.argmax()
    partner = int(largest)
    return max(partner, 1)


def _turn_everywhere(
    module: nn.Module,
    features: Tensor,  # [head_dim]
    max_seq_len: int,
) -> Tensor:  # [max_seq_len, head_dim]
    """Return what the module makes of a head in each position."""
    device = features.device
    positions = torch.arange(max_seq_len, device=device)
    positions = positions[None]
    shape = (1, max_seq_len, 1, -1)
    heads = features.expand(shape)
    turned = module(heads, input_pos=positions)
    return turned[0, :, 0]
