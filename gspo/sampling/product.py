"""Products with a weight that changes once per update of the sampler, packed where that is faster.

On a CPU a product of few rows takes up to half as long again from a weight in plain rows as from
one in the blocks of the library that computes it. Such a copy is made before the first product
after a change. Nothing is packed on other devices, nor in 16 bits, nor a small weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gspo.compat import (
    can_pack_weights,
    multiply_packed,
    multiply_packed_and_add,
    multiply_packed_times,
    pack_weight,
)

# Entries from which on a packed weight is faster: a call with one takes some 10 microseconds more.
PACKED_FROM = 2**16


class Product:
    """A linear map that a module has the weight of.

    Args:
        module: has a ``weight`` [out, in], and may have a ``bias`` [out].
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._packed: Tensor | None = None
        self._state: tuple[int, int] | None = None  # of the weight that was packed

    @property
    def weight(self) -> Tensor:
        """Return the weight [out, in] as the module has it."""
        return self._module.weight

    @property
    def bias(self) -> Tensor | None:
        """Return the bias [out], if there is one."""
        return getattr(self._module, "bias", None)

    @property
    def out_features(self) -> int:
        """Return the number of features of the result."""
        return self.weight.shape[0]

    def refresh(self) -> None:
        """Pack the weight if it has changed since."""
        weight = self.weight
        # An inference tensor does not tell that it has changed.
        is_packable = weight.device.type == "cpu" and not weight.is_inference()
        if not (is_packable and is_worth_packing(weight)):
            self._packed = None
            return
        state = (weight.data_ptr(), weight._version)
        if self._packed is None or state != self._state:
            self._packed = None  # so that there are never two
            self._packed = pack_weight(weight.detach())
            self._state = state

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        return multiply_packed(x, self._packed, self.bias)

    def add(
        self,
        x: Tensor,  # [N, in]
        other: Tensor,  # [N, out]
    ) -> Tensor:
        """Return x W^T + b + other."""
        bias = self.bias
        if self._packed is not None:
            return multiply_packed_and_add(x, self._packed, bias, other)
        added = torch.addmm(other, x, self.weight.t())
        if bias is None:
            return added
        return added.add_(bias)

    def activate(self, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Return activation(x W^T + b)."""
        if self._packed is not None and type(activation) is nn.SiLU:
            return multiply_packed(x, self._packed, self.bias, "swish")
        return activation(self(x))

    def multiply_(
        self,
        x: Tensor,  # [N, in]
        other: Tensor,  # [N, out], may be overwritten
    ) -> Tensor:
        """Return (x W^T + b) * other."""
        if self._packed is None:
            return other.mul_(self(x))
        return multiply_packed_times(x, self._packed, self.bias, other)


def is_worth_packing(weight: Tensor) -> bool:
    """Return whether products with this weight are faster on a CPU from a packed copy of it."""
    is_large = weight.dim() == 2 and weight.numel() >= PACKED_FROM
    return is_large and weight.dtype is torch.float32 and can_pack_weights()
