"""Reads and writes folders of transformers models, through the library itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune import training
from transformers import AutoModelForCausalLM, PretrainedConfig

from gspo.decoder import unique_state
from gspo.errors import InputError, first_line
from gspo.models.huggingface.causal_lm import read_config

# What a folder holds beside weights and config that a model is not complete without.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


class Checkpointer:
    """A checkpointer of torchtune's form for folders of transformers models.

    Names and files are those that the library has: experts that it keeps in one tensor are split
    again, a tied head is written once, large models in several files.

    Args:
        path: the folder to read, with weights in safetensors.
        output_dir: where ``epoch_N/`` are written, each a folder of the same kind.

    Raises:
        InputError: There is no model in the folder.
    """

    def __init__(self, path: str, output_dir: str) -> None:
        self._config = read_config(path)
        self._path = path
        self._output_dir = Path(output_dir)

    def load_checkpoint(self) -> dict[str, Any]:
        """Return all weights by the names of the model's parameters, a tied head's left out.

        Raises:
            InputError: Weights cannot be read, or are not those of config.json.
        """
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                self._path,
                config=self._config,
                dtype="auto",
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # the report names them
                output_loading_info=True,
            )
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            raise self._refusal(f"has weights that cannot be read: {problem}") from error
        self._check(report)
        weights = {name: value.detach() for name, value in unique_state(model).items()}
        return {training.MODEL_KEY: weights}

    def _check(self, report: dict[str, Any]) -> None:
        """Refuse weights that are not those of the model that config.json tells of."""
        for name, shape, wanted in sorted(report["mismatched_keys"]):
            must = f"has {name} with the shape {list(shape)}, but config.json has {list(wanted)}"
            raise self._refusal(must)
        kinds = {"missing_keys": "lacks", "unexpected_keys": "has, unlike its config.json,"}
        for kind, verb in kinds.items():
            names = sorted(report[kind])
            if names:
                raise self._refusal(f"{verb} {names[0]} (of {len(names)} such weights)")

    def _refusal(self, must: str) -> InputError:
        remedy = "get the model again, with its config.json and all of its .safetensors files"
        return InputError("path", self._path, must, remedy)

    def save_checkpoint(self, state_dict: dict[str, Any], epoch: int, **_: Any) -> None:
        """Write a model that transformers loads as it is.

        Args:
            state_dict: with the weights by name under torchtune's key.
            epoch: the number in the folder's name.
        """
        folder = self._output_dir / f"epoch_{epoch}"
        write_model(self._config, state_dict[training.MODEL_KEY], folder)
        for pattern in _COPIED:
            for file in Path(self._path).glob(pattern):
                shutil.copyfile(file, folder / file.name)


def write_model(config: PretrainedConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Write weights, by the names of the model's parameters, with the model's config."""
    folder.mkdir(parents=True, exist_ok=True)
    model = _model_with(config, weights)
    model.save_pretrained(folder)


def _model_with(config: PretrainedConfig, weights: dict[str, Tensor]) -> Any:
    """Return a model that holds these tensors themselves."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    holders: dict[str, nn.Module] = dict(model.named_modules())
    for name in unique_state(model):
        holder, _, own_name = name.rpartition(".")
        weight = nn.Parameter(weights[name], requires_grad=False)
        setattr(holders[holder], own_name, weight)
    model.tie_weights()
    return model
