"""Frozen weights in 4 bits, NF4 of QLoRA (https://arxiv.org/abs/2305.14314, appendix E).

A weight is cut into blocks of 64 entries of a row. Each block keeps its largest magnitude in
float32 and, for each entry, the nearest of sixteen values: 4.5 bits an entry. Codes and scales are
plain parameters with one row for each row of the weight, so FSDP2 shards them as any other, over
any number of ranks. The scales are not quantized once more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspo.errors import require

BLOCK = 64  # entries of a row that share a scale

# Quantiles of a standard normal distribution, scaled to [-1, 1], with an exact 0.
_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes [out, in / 2] uint8, two in a byte, and scales [out, in / 64] float32.

    Args:
        weight: [out, in], where in is a multiple of 64.
    """
    values = torch.tensor(_VALUES, device=weight.device)
    blocks = weight.float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    divisors = scales.clamp(min=torch.finfo(torch.float32).tiny)
    scaled = blocks / divisors.unsqueeze(-1)
    halfway = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(scaled, halfway).flatten(1).to(torch.uint8)
    packed = codes[:, ::2] * 16 + codes[:, 1::2]
    return packed, scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:  # [out, in]
    """Return the weight that codes [out, in / 2] and scales [out, in / 64] stand for."""
    values = torch.tensor(_VALUES, device=codes.device)
    first = codes >> 4
    second = codes & 15
    indices = torch.stack((first, second), -1).flatten(1)
    blocks = values[indices.int()].unflatten(1, (-1, BLOCK))
    scaled = blocks * scales.unsqueeze(-1)
    return scaled.flatten(1).to(dtype)


class NF4Linear(nn.Module):
    """A frozen linear map whose weight is kept in 4 bits.

    Args:
        in_features: a multiple of 64.
        out_features: rows of the weight.
        bias: a vector that is added, or None.
        dtype: of the weight as it is used.
        device: of codes and scales.

    Raises:
        InputError: ``in_features`` is no multiple of 64.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        require(
            in_features % BLOCK == 0,
            "quantize_base",
            True,
            f"needs weights with a multiple of {BLOCK} columns, and one has {in_features}",
            "set it to False",
        )
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(out_features, in_features // BLOCK, dtype=torch.float32, device=device)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], computed anew; it has no gradient."""
        return dequantize(self.codes, self.scales, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``."""
        output = _NF4Product.apply(x, self.codes, self.scales)
        return output if self.bias is None else output + self.bias


class _NF4Product(torch.autograd.Function):
    """A product with a weight that is computed from its codes again in the backward.

    Kept for the backward would be the whole weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, dequantize(codes, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        weight = dequantize(codes, scales, gradient.dtype)
        return gradient @ weight, None, None
