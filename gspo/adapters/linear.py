"""A linear map with a low-rank update, in the place of torchtune's own modules.

torchtune's ``LoRALinear`` computes the same. Its ``DoRALinear`` does not where there is a bias, as
in Qwen2: it scales the bias too, which neither the paper nor ``peft`` does. Its 4-bit weights
cannot be sharded over any number of ranks. So a policy takes the parameters of both and computes by
itself; names and shapes of adapters stay torchtune's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import DoRALinear, LoRALinear

from gspo.adapters.nf4 import NF4Linear
from gspo.errors import NO_VALUE, require


class AdaptedLinear(nn.Module):
    """The map ``W x + b + s B A x``, or DoRA's ``m / |W + s B A| (W + s B A) x + b``.

    LoRA: https://arxiv.org/abs/2106.09685. DoRA: https://arxiv.org/abs/2402.09353, equation 5, with
    the norm of each row taken as a constant in the gradient (section 4.3).

    Args:
        base_layer: frozen, with ``weight`` [out, in] and ``bias``.
        lora_a: A [r, in].
        lora_b: B [out, r].
        scale: s, alpha over rank.
        magnitude: m [out] of DoRA, or None.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        lora_a: nn.Linear,
        lora_b: nn.Linear,
        *,
        scale: float,
        magnitude: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.lora_a = lora_a
        self.lora_b = lora_b
        self.scale = scale
        self.register_parameter("magnitude", magnitude)
        self.is_disabled = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the map's output, or the base layer's while the adapter is off."""
        output = self.base_layer(x)
        if self.is_disabled:
            return output
        update = self.scale * self.lora_b(self.lora_a(x))
        if self.magnitude is None:
            return output + update
        bias = self.base_layer.bias
        product = output if bias is None else output - bias
        scaled = self._row_factors() * (product + update)
        return scaled if bias is None else scaled + bias

    def _row_factors(self) -> Tensor:  # [out]
        """Return the magnitudes over the norms of the rows."""
        with torch.no_grad():
            update = self.lora_b.weight @ self.lora_a.weight
            rows = self.base_layer.weight + self.scale * update
            norms = torch.linalg.vector_norm(rows, dim=1)
        return self.magnitude / norms


def replace_torchtune(decoder: nn.Module) -> None:
    """Put the modules of this file in the place of torchtune's, in place.

    Parameters stay the same ones, but for 4-bit weights, whose values are not taken over.
    """
    for module in list(decoder.modules()):
        for name, child in module.named_children():
            replacement = _replacement(child)
            if replacement is not None:
                setattr(module, name, replacement)


def _replacement(module: nn.Module) -> nn.Module | None:
    """Return what takes the place of a module, None if it stays."""
    if isinstance(module, FrozenNF4Linear):
        return _base_layer(module)
    if isinstance(module, LoRALinear | DoRALinear):
        check_no_dropout(module.dropout)
    if isinstance(module, LoRALinear):
        scale = module.alpha / module.rank
        return AdaptedLinear(_base_layer(module), module.lora_a, module.lora_b, scale=scale)
    if isinstance(module, DoRALinear):
        return AdaptedLinear(
            _base_layer(module),
            module.lora_a,
            module.lora_b,
            scale=module.scaling,
            magnitude=module.magnitude,
        )
    return None


def _base_layer(module: Any) -> nn.Module:
    weight = module.weight
    num_rows, num_columns = weight.shape
    if isinstance(weight.data, NF4Tensor):
        return NF4Linear(
            num_columns, num_rows, bias=module.bias, dtype=weight.dtype, device=weight.device
        )
    with torch.device("meta"):
        layer = nn.Linear(num_columns, num_rows, bias=False)
    layer.weight = weight
    layer.bias = module.bias
    return layer


def check_no_dropout(dropout: nn.Module) -> None:
    """Refuse an adapter with dropout.

    Raises:
        InputError: The module that drops is no identity.
    """
    require(
        isinstance(dropout, nn.Identity),
        "lora_dropout",
        getattr(dropout, "p", NO_VALUE),
        "must be 0: with dropout the policy is not the one that sampled",
        "leave it out",
    )
