"""A model that the caller holds, of transformers or torchtune, as the start of a policy.

Nothing is copied that need not be: the model's weights are moved into the policy's shards, and the
model itself becomes the policy's decoder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gspo.adapters import check_peft_configs
from gspo.decoder import PARTS, unique_state
from gspo.errors import InputError, require


@dataclass
class Start:
    """A model taken apart, from which a policy and its replicas are made.

    Args:
        decoder: the caller's model, on the meta device, in a decoder's form.
        weights: whole, by name; to be dropped when the policies have them.
        blank: a copy of the model as it was, on the meta device.
        config: of transformers, as it was; None for a model of torchtune.
    """

    decoder: Any
    weights: dict[str, Tensor]
    blank: Any
    config: Any

    def another_decoder(self) -> Any:
        """Return one more decoder on the meta device."""
        return _as_decoder(copy.deepcopy(self.blank))


def take_over(model: Any) -> Start:
    """Take the weights out of a model and make a decoder of it, in place.

    Raises:
        InputError: It is no model, or one that has no weights any more.
    """
    check_model(model)
    model = _without_wrapper(model)
    weights = {}
    for name, value in unique_state(model).items():
        plain = name.replace(".base_layer.", ".")  # as a checkpoint has it
        weights[plain] = value.detach()
    config = copy.deepcopy(model.config) if is_of_transformers(model) else None
    model.to("meta")
    if config is not None:
        model.tie_weights()
    blank = copy.deepcopy(model)
    return Start(_as_decoder(model), weights, blank, config)


def check_model(model: Any) -> None:
    """Refuse what is no model, or one that has no weights any more.

    Raises:
        InputError: It says what is needed.
    """
    kind = type(model).__name__
    is_decoder = all(hasattr(model, name) for name in PARTS)
    is_model = isinstance(model, nn.Module) and (is_decoder or is_of_transformers(model))
    must = "is neither a causal language model of transformers nor a decoder of torchtune"
    require(is_model, "model", kind, must, "give e.g. AutoModelForCausalLM.from_pretrained(NAME)")
    if next(model.parameters()).is_meta:
        must = "has no weights: it is on the meta device"
        raise InputError("model", kind, must, "load it anew")
    check_peft_configs(model)
    if hasattr(model, "windows"):
        must = "is another trainer's policy"
        raise InputError("model", kind, must, "save that trainer's model and load it")


def _without_wrapper(model: Any) -> Any:
    """Return the model in a ``PeftModel``, which has its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def num_embeddings(model: Any) -> int:
    """Return the size of a model's vocabulary."""
    embedding = model.get_input_embeddings() if is_of_transformers(model) else model.tok_embeddings
    return embedding.num_embeddings


def is_of_transformers(model: Any) -> bool:
    """Whether a model is one of transformers, which need not be installed."""
    return hasattr(model, "base_model") and hasattr(model, "config")


def _as_decoder(model: Any) -> Any:
    if not is_of_transformers(model):
        return model
    from gspo.models.huggingface import as_decoder

    return as_decoder(model)


def as_tokenizer(tokenizer: Any, model: Any) -> Any:
    """Return a tokenizer in torchtune's form.

    Args:
        tokenizer: of torchtune, or of transformers.
        model: whose generation config says what ends a completion, if it has one.
    """
    if not hasattr(tokenizer, "apply_chat_template"):
        return tokenizer
    from gspo.models.huggingface import HuggingFaceTokenizer, stop_tokens

    generation = getattr(model, "generation_config", None)
    stated = getattr(generation, "eos_token_id", None)
    return HuggingFaceTokenizer(tokenizer, stop_tokens(stated, tokenizer))
