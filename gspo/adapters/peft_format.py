"""Folders of adapters in the format of ``peft``, which it and servers load.

An adapter is written by the names and in the order of rows that transformers has, see
:mod:`gspo.adapters.transformers_names`. Where transformers has several maps in one, as in Phi 3,
their updates become one of the sum of their ranks: B in blocks, A one below the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchtune import training

from gspo.adapters.form import Adapter, Adapters, State
from gspo.adapters.transformers_names import Part, parts_by_name
from gspo.decoder import unique_state
from gspo.errors import InputError, first_line, require

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

ADAPTER_PREFIX = "adapter"  # of the names of the folders that a run writes, before the step

Weights = Mapping[str, Tensor]


def starting_adapters(
    path: str | None, decoder: Any, checkpointer: Any
) -> dict[str, Tensor]:  # by their names in the decoder's state
    """Return the adapters that training goes on from; none where it starts with new ones.

    Args:
        path: a folder in the format of ``peft``, or None.
        decoder: with or without adapters, on any device.
        checkpointer: of its base model.

    Raises:
        InputError: The folder does not fit the decoder, or what is trained could not be saved.
    """
    adapters = Adapters(decoder)
    if not adapters:
        must = "names adapters, and the model is one without"
        remedy = "build the model with the adapters that the folder has"
        require(path is None, "adapter_path", path, must, remedy)
        return {}
    form = PeftFormat(adapters, unique_state(decoder), checkpointer)
    return {} if path is None else form.read(Path(path))


class AdapterCheckpointer:
    """A writer of a policy's adapters in the form of torchtune's checkpointers.

    Args:
        policy: has adapters.
        checkpointer: of the base model.
        output_dir: where ``adapter_N/`` are written.
    """

    def __init__(self, policy: Any, checkpointer: Any, output_dir: Path) -> None:
        self._format = PeftFormat(policy.adapters, unique_state(policy.decoder), checkpointer)
        self._output_dir = output_dir

    def save_checkpoint(self, state_dict: dict[str, Any], epoch: int) -> None:
        """Write the adapters of a step, whole, under torchtune's key for models."""
        folder = Path(self._output_dir) / f"{ADAPTER_PREFIX}_{epoch}"
        self._format.write(folder, state_dict[training.MODEL_KEY])


class PeftFormat:
    """The adapters of a decoder as ``peft`` has them.

    Args:
        adapters: of the decoder.
        state: the decoder's, for names and shapes.
        checkpointer: of the decoder, which knows the base model's folder.

    Raises:
        InputError: The adapters have no form there.
    """

    def __init__(self, adapters: Adapters, state: State, checkpointer: Any) -> None:
        self._base = _base_folder(checkpointer)
        self.maps: list[AdaptedMap] = []
        plain_state = adapters.plain_state(state)
        by_weight = {adapter.weight: adapter for adapter in adapters}
        for name, parts in parts_by_name(plain_state, checkpointer).items():
            of_parts = [by_weight[part.weight] for part in parts if part.weight in by_weight]
            if not of_parts:
                continue
            adapted = AdaptedMap(name, parts, by_weight, state)
            adapted.check()
            self.maps.append(adapted)

    def write(self, folder: Path, weights: Weights) -> None:
        """Write a folder.

        Args:
            folder: made if it is not there.
            weights: of the adapters, whole, by their names in the decoder's state.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for adapted in self.maps:
            for kind, value in adapted.joined(weights).items():
                tensors[f"{_PREFIX}{adapted.name}.{kind}"] = value.contiguous()
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(self._config(), indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n")

    def _config(self) -> dict[str, Any]:
        """Return what stands beside the weights."""
        ranks = {adapted.name: adapted.rank for adapted in self.maps}
        alphas = {adapted.name: adapted.alpha for adapted in self.maps}
        rank = min(ranks.values())
        alpha = min(alphas.values())
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._base,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: x for name, x in ranks.items() if x != rank},
            "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
            "target_modules": _targets(list(ranks)),
            "use_dora": self.maps[0].has_magnitude,
            "use_rslora": False,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Return the adapters of a folder, by their names in the decoder's state.

        Raises:
            InputError: There are none, or they are not those of this decoder.
        """
        config, tensors = _read_files(folder)
        _check_kind(config, folder)
        self._check_base(config, folder)
        weights: dict[str, Tensor] = {}
        for adapted in self.maps:
            of_map = {}
            for kind in adapted.kinds:
                key = f"{_PREFIX}{adapted.name}.{kind}"
                require(
                    key in tensors,
                    "adapter_path",
                    str(folder),
                    f"has no {key}",
                    "build the model with the adapters that the folder has",
                )
                of_map[kind] = tensors.pop(key)
            adapted.check_file(folder, of_map, _scale_of(config, adapted.name))
            weights |= adapted.taken_apart(of_map, folder)
        if tensors:
            must = f"also has {min(tensors)}, which the model has no place for"
            remedy = "build the model with the adapters that the folder has"
            raise InputError("adapter_path", str(folder), must, remedy)
        return weights

    def _check_base(self, config: dict[str, Any], folder: Path) -> None:
        """Refuse adapters of another model, as far as its name tells."""
        stated = config.get("base_model_name_or_path")
        if not stated or Path(stated).name == Path(self._base).name:
            return
        raise InputError(
            "adapter_path",
            str(folder),
            f"has adapters of {stated}, and the checkpoint is {self._base}",
            f"name the right one, or correct base_model_name_or_path in its {CONFIG_FILE}",
        )


@dataclass(frozen=True, slots=True)
class AdaptedMap:
    """A linear map of transformers, with the parts of it that a decoder has as maps."""

    name: str
    parts: list[Part]
    by_weight: Mapping[str, Adapter]
    state: State

    @property
    def _adapted(self) -> list[tuple[Part, Adapter]]:
        pairs = []
        for part in self.parts:
            adapter = self.by_weight.get(part.weight)
            if adapter is not None:
                pairs.append((part, adapter))
        return pairs

    @property
    def rank(self) -> int:
        """The rank of all parts together."""
        return sum(self._rank(adapter) for _, adapter in self._adapted)

    @property
    def alpha(self) -> float:
        """The alpha with which ``alpha / rank`` is the scale of the parts."""
        _, adapter = self._adapted[0]
        alpha = adapter.scale * self.rank
        return int(alpha) if alpha == int(alpha) else alpha

    @property
    def has_magnitude(self) -> bool:
        """Whether it is DoRA."""
        return self._adapted[0][1].magnitude is not None

    @property
    def kinds(self) -> list[str]:
        """The tensors that the format has of it."""
        magnitude = ["lora_magnitude_vector"] if self.has_magnitude else []
        return ["lora_A.weight", "lora_B.weight", *magnitude]

    @property
    def _num_rows(self) -> int:
        return sum(len(part.places) for part in self.parts)

    def _rank(self, adapter: Adapter) -> int:
        return self.state[adapter.down].shape[0]

    def check(self) -> None:
        """Refuse DoRA of some parts alone: the others would need magnitudes too."""
        is_whole = len(self._adapted) == len(self.parts)
        if is_whole or not self.has_magnitude:
            return
        missing = [part.weight for part in self.parts if part.weight not in self.by_weight]
        raise InputError(
            "model",
            missing[0],
            f"has no DoRA, and other parts of transformers' {self.name} have",
            "adapt all of them, or use LoRA",
        )

    def joined(self, weights: Weights) -> dict[str, Tensor]:
        """Return the tensors of the whole map."""
        downs = [weights[adapter.down] for _, adapter in self._adapted]
        up = downs[0].new_zeros(self._num_rows, self.rank)
        magnitude = downs[0].new_zeros(self._num_rows)
        first = 0
        for part, adapter in self._adapted:
            last = first + self._rank(adapter)
            up[part.places, first:last] = weights[adapter.up][part.rows]
            if adapter.magnitude is not None:
                magnitude[part.places] = weights[adapter.magnitude][part.rows]
            first = last
        values = (torch.cat(downs), up, magnitude)
        return dict(zip(self.kinds, values, strict=False))

    def taken_apart(self, tensors: Weights, folder: Path) -> dict[str, Tensor]:
        """Return the adapters of the parts, by their names in the decoder's state."""
        down, up = tensors["lora_A.weight"], tensors["lora_B.weight"]
        weights = {}
        rest = up.clone()
        first = 0
        for part, adapter in self._adapted:
            last = first + self._rank(adapter)
            weights[adapter.down] = down[first:last]
            own_up = up.new_zeros(len(part.rows), last - first)
            own_up[part.rows] = up[part.places, first:last]
            weights[adapter.up] = own_up
            rest[part.places, first:last] = 0
            if adapter.magnitude is not None:
                magnitude = up.new_zeros(len(part.rows))
                magnitude[part.rows] = tensors["lora_magnitude_vector"][part.places]
                weights[adapter.magnitude] = magnitude
            first = last
        must = f"has an update of {self.name} that its parts do not have apart"
        remedy = "use gspo.models.huggingface.lora_causal_lm, which has them in one too"
        require(not rest.any(), "adapter_path", str(folder), must, remedy)
        return weights

    def check_file(self, folder: Path, tensors: Weights, scale: float) -> None:
        """Refuse adapters of another size or scale."""
        _, adapter = self._adapted[0]
        num_columns = self.state[adapter.down].shape[1]
        want = {
            "lora_A.weight": (self.rank, num_columns),
            "lora_B.weight": (self._num_rows, self.rank),
            "lora_magnitude_vector": (self._num_rows,),
        }
        for kind, tensor in tensors.items():
            require(
                tuple(tensor.shape) == want[kind],
                "adapter_path",
                str(folder),
                f"has {list(tensor.shape)} of {self.name}.{kind}, and the model {list(want[kind])}",
                "build the model with the rank that the folder has, on the base that it is for",
            )
        if not math.isclose(scale, adapter.scale, rel_tol=1e-6):
            raise InputError(
                "adapter_path",
                str(folder),
                f"scales its update by {scale:g}, and the model by {adapter.scale:g}",
                f"set lora_alpha to {scale * self.rank:g}, for rank {self.rank}",
            )


def _base_folder(checkpointer: Any) -> str:
    for name in ("path", "_path", "_checkpoint_dir"):
        folder = getattr(checkpointer, name, None)
        if folder is not None:
            return str(folder)
    return ""


def _targets(names: list[str]) -> list[str]:
    """Return the last parts of the names, or the names where not all layers are alike."""
    of_layer: dict[str, set[str]] = {}
    for name in names:
        layer = name.split(".")[2]
        of_layer.setdefault(layer, set()).add(name.rpartition(".")[2])
    kinds = list(of_layer.values())
    are_alike = all(kind == kinds[0] for kind in kinds)
    return sorted(kinds[0]) if are_alike else sorted(names)


def _scale_of(config: dict[str, Any], name: str) -> float:
    """Return what an update is multiplied by."""
    rank = _of_pattern(config, "rank_pattern", "r", name)
    alpha = _of_pattern(config, "alpha_pattern", "lora_alpha", name)
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return alpha / divisor


def _of_pattern(config: dict[str, Any], pattern: str, key: str, name: str) -> float:
    for suffix, value in (config.get(pattern) or {}).items():
        if name == suffix or name.endswith(f".{suffix}"):
            return value
    return config[key]


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config of a folder and its tensors.

    Raises:
        InputError: A file is missing or damaged.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        tensors = {}
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            for name in file.keys():
                tensors[name] = file.get_tensor(name)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            "adapter_path",
            str(folder),
            f"cannot be read: {first_line(error)}",
            f"name a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as a run writes adapter_N",
        ) from error
    return config, tensors


def _check_kind(config: dict[str, Any], folder: Path) -> None:
    """Refuse adapters that are not LoRA's or DoRA's."""
    for key in ("r", "lora_alpha"):
        is_number = isinstance(config.get(key), int | float)
        must = f"has {key} {config.get(key)!r} in its {CONFIG_FILE}"
        require(is_number, "adapter_path", str(folder), must, "name a folder of LoRA adapters")
    kind = config.get("peft_type")
    must = f"has adapters of kind {kind}, not LORA"
    require(kind == "LORA", "adapter_path", str(folder), must, "name a folder of LoRA adapters")
