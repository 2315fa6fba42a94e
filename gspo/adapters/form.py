"""The adapters of a decoder, of torchtune or ``peft``, by the names of its state.

An adapted linear map X has its base weight under ``X.base_layer.weight``. A weight that is kept in
4 bits is two entries, ``codes`` and ``scales``. Checkpoints, samplers and merged models know both
kinds as ``X.weight``: the plain name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gspo.adapters.linear import AdaptedLinear, check_no_dropout, replace_torchtune
from gspo.adapters.nf4 import NF4Linear, dequantize, quantize
from gspo.errors import require

_REMEDY = "use LoRA or DoRA on the linear maps of the layers"

State = Mapping[str, Tensor]
Gather = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapted linear map. The names are those of a decoder's state."""

    name: str  # of the map
    down: str  # A [r, in]
    up: str  # B [out, r]
    magnitude: str | None  # [out], of DoRA
    scale: float

    @property
    def weight(self) -> str:
        """The plain name of the base weight."""
        return f"{self.name}.weight"

    @property
    def names(self) -> list[str]:
        """The names of what is trained."""
        names = [self.down, self.up]
        if self.magnitude is not None:
            names.append(self.magnitude)
        return names

    def merge(self, weight: Tensor, value_of: Gather) -> Tensor:  # [out, in]
        """Return the weight with its update, computed in float32."""
        up = value_of(self.up)
        down = value_of(self.down)
        merged = weight.float() + self.scale * (up.float() @ down.float())
        if self.magnitude is not None:
            magnitude = value_of(self.magnitude).float()
            factors = magnitude / torch.linalg.vector_norm(merged, dim=1)
            merged = merged * factors.unsqueeze(1)
        return merged.to(weight.dtype)


class Adapters:
    """The adapters of a decoder; none, and then false, for one that is trained whole.

    Args:
        decoder: unsharded. torchtune's adapters are replaced, see :mod:`gspo.adapters.linear`.

    Raises:
        InputError: It has adapters of a kind that is not known here, or dropout.
    """

    def __init__(self, decoder: Any) -> None:
        replace_torchtune(decoder)
        self._modules: list[nn.Module] = []
        self._by_weight: dict[str, Adapter] = {}
        self._quantized: dict[str, torch.dtype] = {}  # names of codes, and dtypes of their weights
        for name, module in decoder.named_modules():
            if isinstance(module, NF4Linear):
                self._quantized[f"{name}.codes"] = module.dtype
            adapter = _adapter(name, module)
            if adapter is not None:
                self._modules.append(module)
                self._by_weight[adapter.weight] = adapter
        self.trained = {name for adapter in self for name in adapter.names}
        if self.trained:
            _check_decoder(decoder)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._by_weight)

    def __iter__(self) -> Iterator[Adapter]:
        """Go through them in the order of the model."""
        return iter(self._by_weight.values())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the decoder compute what its base model does."""
        self._switch(is_disabled=True)
        try:
            yield
        finally:
            self._switch(is_disabled=False)

    def _switch(self, *, is_disabled: bool) -> None:
        for module in self._modules:
            if isinstance(module, AdaptedLinear):
                module.is_disabled = is_disabled
            else:
                # The method of peft would also change what is trained.
                module._disable_adapters = is_disabled  # type: ignore[assignment]

    def plain_state(self, state: State) -> dict[str, Tensor]:
        """Return what stands for the base model's weights in a decoder's state, by plain names.

        Of a weight in 4 bits that is a tensor of its shape on the meta device.
        """
        plain = {}
        for name, value in state.items():
            if name in self._quantized:
                num_rows, num_bytes = value.shape
                dtype = self._quantized[name]
                value = torch.empty(num_rows, num_bytes * 2, dtype=dtype, device="meta")
            if self._has_plain_name(name):
                plain[self._plain_name(name)] = value
        return plain

    def _has_plain_name(self, name: str) -> bool:
        return name not in self.trained and _codes_of_scales(name) not in self._quantized

    def _plain_name(self, name: str) -> str:
        if name in self._quantized:
            name = name.removesuffix("codes") + "weight"
        return name.replace(".base_layer.", ".")

    def values(self, state: State, weights: State, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole value of every entry of a decoder's state, by name.

        Adapters that are not among the weights start as in the papers: A uniform between
        ``-1 / sqrt(in)`` and ``1 / sqrt(in)``, B zero, and magnitudes the norms of the rows.

        Args:
            state: the decoder's, by name, for the shapes.
            weights: by plain names, and adapters by their own.
            seed: of A, the same on all ranks.
        """
        generator = torch.Generator().manual_seed(seed)
        for name in state:
            if not self._has_plain_name(name):
                continue
            plain = self._plain_name(name)
            weight = weights[plain]
            if name in self._quantized:
                codes, scales = quantize(weight)
                yield name, codes
                yield name.removesuffix("codes") + "scales", scales
                weight = dequantize(codes, scales, torch.float32)
            else:
                yield name, weight
            adapter = self._by_weight.get(plain)
            if adapter is not None:
                started = _start(adapter, state, weight, generator)
                for part in adapter.names:
                    yield part, weights.get(part, started[part])

    def merged(self, state: State, value_of: Gather) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of a plain model that computes the same, by plain names.

        Args:
            state: the decoder's, by name.
            value_of: returns a whole value by its name.
        """
        for name in state:
            if not self._has_plain_name(name):
                continue
            weight = value_of(name)
            if name in self._quantized:
                scales = value_of(name.removesuffix("codes") + "scales")
                weight = dequantize(weight, scales, self._quantized[name])
            plain = self._plain_name(name)
            adapter = self._by_weight.get(plain)
            yield plain, weight if adapter is None else adapter.merge(weight, value_of)


def _codes_of_scales(name: str) -> str:
    return name.removesuffix("scales") + "codes"


def _start(
    adapter: Adapter, state: State, weight: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the values with which an adapter changes nothing."""
    down_shape = tuple(state[adapter.down].shape)
    bound = 1 / math.sqrt(down_shape[1])
    uniform = torch.rand(down_shape, generator=generator)
    values = {
        adapter.down: (2 * uniform - 1) * bound,
        adapter.up: torch.zeros(tuple(state[adapter.up].shape)),
    }
    if adapter.magnitude is not None:
        values[adapter.magnitude] = torch.linalg.vector_norm(weight.float(), dim=1)
    return values


def _adapter(name: str, module: Any) -> Adapter | None:
    """Return the adapter of a module, None if it has none.

    Raises:
        InputError: It is adapted in another way.
    """
    if isinstance(module, AdaptedLinear):
        magnitude = None if module.magnitude is None else f"{name}.magnitude"
        return Adapter(
            name, f"{name}.lora_a.weight", f"{name}.lora_b.weight", magnitude, module.scale
        )
    if not hasattr(module, "base_layer"):
        return None
    kind = f"{type(module).__module__}.{type(module).__name__}"
    is_linear = kind == "peft.tuners.lora.layer.Linear"
    require(is_linear, "model", name, f"is a {kind}, an adapter unknown here", _REMEDY)
    active = module.active_adapters
    must = f"has the adapters {active} at once"
    require(len(active) == 1, "model", name, must, "load one alone")
    label = active[0]
    check_no_dropout(module.lora_dropout[label])
    require(not module.lora_bias[label], "model", name, "trains a bias of B", _REMEDY)
    magnitude = f"{name}.lora_magnitude_vector.{label}.weight"
    return Adapter(
        name,
        f"{name}.lora_A.{label}.weight",
        f"{name}.lora_B.{label}.weight",
        magnitude if module.use_dora[label] else None,
        float(module.scaling[label]),
    )


def _check_decoder(decoder: Any) -> None:
    """Refuse adapters where a policy needs the weight itself.

    Raises:
        InputError: It names the part.
    """
    for part, module in (("output", decoder.output), ("embedding", decoder.tok_embeddings)):
        is_plain = not hasattr(module, "base_layer")
        require(is_plain, "model", part, "has an adapter, which the loss head cannot use", _REMEDY)
    check_peft_configs(decoder)


def check_peft_configs(model: Any) -> None:
    """Refuse a model of which ``peft`` trains more than adapters.

    Raises:
        InputError: It names the option.
    """
    for config in getattr(model, "peft_config", {}).values():
        for name, none in (("bias", "none"), ("modules_to_save", None)):
            value = getattr(config, name, none)
            must = "trains parts of the model beside adapters"
            require(value == none, "model", f"{name}={value!r}", must, _REMEDY)
