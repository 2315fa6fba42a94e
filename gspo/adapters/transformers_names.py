"""The places of a decoder's linear maps in the same model of transformers.

torchtune orders the rows of queries and keys by its own rotary embedding in some families and not
in others, and a model of transformers may have several maps in one tensor. Both are read off the
checkpointer's own conversion: it is given the numbers of the rows in place of weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtune.models import convert_weights
from torchtune.models.gemma2._convert_weights import gemma2_tune_to_hf
from torchtune.models.phi3._convert_weights import phi3_tune_to_hf
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.training import FullModelHFCheckpointer, ModelType

from gspo.adapters.form import State
from gspo.errors import InputError

_ROWS = 2**32  # more than a map has

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Part:
    """A linear map of a decoder as part of one of transformers.

    Row ``rows[i]`` of the part is row ``places[i]`` of the whole.
    """

    weight: str  # plain name
    rows: Tensor  # [out] int64
    places: Tensor  # [out] int64


def parts_by_name(plain_state: State, checkpointer: Any) -> dict[str, list[Part]]:
    """Return the parts of each linear map of transformers, by its name.

    Args:
        plain_state: of the decoder, by plain names, for the shapes.
        checkpointer: of the decoder.

    Raises:
        InputError: The checkpointer is none that knows the names of transformers.
    """
    convert = _conversion(checkpointer)
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    names = [name for name, weight in plain_state.items() if _is_linear(name, weight)]
    for number, name in enumerate(names):
        num_rows = plain_state[name].shape[0]
        numbers = torch.arange(num_rows) + number * _ROWS
        layer = name.split(".")[1]
        layers[layer][name] = numbers.unsqueeze(1)
    parts = {}
    for of_layer in layers.values():
        for name, numbers in convert(of_layer).items():
            parts[name.removesuffix(".weight")] = _parts(numbers.flatten(), names)
    return parts


def _is_linear(name: str, weight: Tensor) -> bool:
    is_in_layer = name.startswith(("layers.", "model.layers."))
    return is_in_layer and name.endswith(".weight") and weight.dim() == 2


def _parts(numbers: Tensor, names: list[str]) -> list[Part]:
    """Return which rows of which maps stand where."""
    parts = []
    of_map = numbers // _ROWS
    for number in of_map.unique().tolist():
        places = (of_map == number).nonzero().flatten()
        rows = numbers[places] % _ROWS
        parts.append(Part(names[number], rows, places))
    return parts


def _conversion(checkpointer: Any) -> Convert:
    """Return the conversion to transformers' names that a checkpointer saves by."""
    if not hasattr(checkpointer, "_model_type"):
        return lambda state: state
    if not isinstance(checkpointer, FullModelHFCheckpointer):
        raise InputError(
            "checkpointer",
            type(checkpointer).__name__,
            "cannot write adapters, whose format has the names of transformers",
            "use torchtune.training.FullModelHFCheckpointer and the model in that format",
        )
    model_type = checkpointer._model_type
    if model_type in (ModelType.PHI3_MINI, ModelType.PHI4):
        return phi3_tune_to_hf
    config = checkpointer._config
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    tune_to_hf = {
        ModelType.QWEN2: qwen2_tune_to_hf,
        ModelType.GEMMA2: gemma2_tune_to_hf,
    }.get(model_type, convert_weights.tune_to_hf)

    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return tune_to_hf(
            state,
            num_heads=num_heads,
            num_kv_heads=config["num_key_value_heads"],
            dim=1,  # columns of the numbers
            head_dim=head_dim,
        )

    return convert
