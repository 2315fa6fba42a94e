"""A causal language model of ``transformers`` in the form of a torchtune decoder.

The model stays what it is: its modules, and the names of its parameters. What is put over it is a
subclass that is called with tokens, masks and positions and returns normalised hidden states, and
whose layers attend by :mod:`gspo.models.huggingface.attention`. Masks hold all that keeps packed
documents apart, so a layer that mixes tokens by anything else is refused.

Of a model with experts the router is trained through the weights that it gives to experts; its own
balancing loss is not added.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from gspo.decoder import AttentionSizes, HeadForm
from gspo.errors import InputError, first_line, require
from gspo.models.huggingface import attention
from gspo.models.huggingface.incremental import IncrementalCausalLM

# Kinds of layers of which masks tell everything.
_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}  # whether it has a window
# Modules that mix tokens without attention, by a part of their class's name.
_MIXERS = ("Mamba", "RecurrentBlock", "GatedDeltaNet", "ShortConv", "RWKV", "LinearAttention")
# Keys of config.json by which a model changes its logits, in the way of HeadForm.
_HEAD_KEYS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
FOLDER_REMEDY = (
    "give the folder of a model, e.g. what `tune download NAME --output-dir FOLDER` makes"
)
_REMEDY = "choose a decoder whose layers attend, with full or sliding windows"


def causal_lm(path: str, *, max_seq_len: int | None = None) -> Any:
    """Build a model without its weights, on the current default device and in the default dtype.

    Args:
        path: a folder with a ``config.json``, as ``save_pretrained`` and hubs have it.
        max_seq_len: the longest bin that it takes; None for the model's own longest context.

    Raises:
        InputError: There is no such folder, or documents cannot be packed for the model.
    """
    model = build_model(path)
    with naming_the_path(path):
        return as_decoder(model, max_seq_len=max_seq_len)


def build_model(path: str) -> Any:
    """Build the library's own model without its weights.

    Args:
        path: see :func:`causal_lm`.

    Raises:
        InputError: There is no such folder, or documents cannot be packed for the model.
    """
    config = read_config(path)
    with naming_the_path(path):
        check_can_be_packed(config)
        return _empty_model(config)


@contextmanager
def naming_the_path(path: str) -> Iterator[None]:
    """Let refusals of a model, which is read from a folder, name the folder.

    Raises:
        InputError: What the block raises, of the argument ``path``.
    """
    try:
        yield
    except InputError as error:
        if error.key != "model":
            raise
        must = f"is of {error.value}, which {error.must}"
        raise InputError("path", path, must, error.remedy) from error


def _empty_model(config: PretrainedConfig) -> Any:
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
    except Exception as error:
        problem = f"transformers does not build: {type(error).__name__}: {first_line(error)}"
        raise InputError("model", config.model_type, problem, _REMEDY) from error
    model.tie_weights()
    return model


def as_decoder(model: Any, *, max_seq_len: int | None = None) -> Any:
    """Give a model the form of a decoder, in place, by changing its class.

    Args:
        model: any causal language model of the library, with or without weights.
        max_seq_len: see :func:`causal_lm`.

    Raises:
        InputError: Documents cannot be packed for the model.
    """
    check_can_be_packed(model.config)
    _check_parts(model)
    _check_mixers(model)
    model.set_attn_implementation(attention.NAME)
    kind: Any = type(model)
    model.__class__ = _decoder_class(kind)
    model.prepare(max_seq_len)
    return model


def check_folder(path: str) -> None:
    """Refuse a model's path that is no folder, as is a name at a hub.

    Raises:
        InputError: It names the path.
    """
    is_folder = isinstance(path, str) and os.path.isdir(path)
    require(is_folder, "path", path, "is no folder", FOLDER_REMEDY)


def read_config(path: str) -> PretrainedConfig:
    """Read a model's ``config.json``.

    Raises:
        InputError: There is none, or transformers does not know the model.
    """
    check_folder(path)
    file = os.path.join(path, "config.json")
    require(os.path.isfile(file), "path", path, "has no config.json in it", FOLDER_REMEDY)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise InputError(
            "path",
            path,
            f"has a config.json that transformers does not take: {first_line(error)}",
            "correct it, or install a transformers that knows the model",
        ) from error


def check_can_be_packed(config: PretrainedConfig) -> None:
    """Refuse a model with layers that masks cannot keep within a document.

    Raises:
        InputError: It names the kind of layer.
    """
    name = config.model_type
    for kind in getattr(config, "layer_types", None) or []:
        known = ", ".join(_LAYER_TYPES)
        must = f"has {kind} layers; documents can be packed for {known} alone"
        require(kind in _LAYER_TYPES, "model", name, must, _REMEDY)
    require(
        getattr(config, "is_encoder_decoder", False) is False,
        "model",
        name,
        "is an encoder with a decoder",
        _REMEDY,
    )
    for key, value in config.to_dict().items():
        is_known = key in _HEAD_KEYS or key.startswith(("attn_", "router_"))
        if "logit" in key and not is_known and isinstance(value, float) and value != 1.0:
            raise InputError("model", name, f"changes its logits by {key}, unknown here", _REMEDY)


def _check_parts(model: Any) -> None:
    """Refuse a model that is not laid out as decoders of text are."""
    name = type(model).__name__
    for part in ("layers", "norm"):
        must = f"has no {part} where decoders of text have them"
        require(hasattr(model.base_model, part), "model", name, must, _REMEDY)
    has_length = hasattr(model.config.get_text_config(), "max_position_embeddings")
    require(has_length, "model", name, "has no max_position_embeddings", _REMEDY)
    calls_ours = getattr(model, "_supports_attention_backend", False)
    must = "has attention of its own, which takes no other function"
    require(calls_ours, "model", name, must, _REMEDY)


def _check_mixers(model: nn.Module) -> None:
    for module in model.modules():
        name = type(module).__name__
        for part in _MIXERS:
            must = "mixes tokens without attention, which no mask keeps within a document"
            require(part not in name, "model", name, must, _REMEDY)


@cache
def _decoder_class(base: Any) -> type:
    """Return a subclass of a model's class that has a decoder's form."""
    return type(f"Packed{base.__name__}", (_Decoder, base), {"__module__": __name__})


class _Decoder(nn.Module):
    """The form of a decoder, to be put over a model by changing its class."""

    config: Any
    base_model: Any
    get_input_embeddings: Any
    get_output_embeddings: Any
    _init_weights: Any

    def prepare(self, max_seq_len: int | None) -> None:
        """Attach the attention, and find what layers and head of this model are like."""
        config = self.config.get_text_config()
        longest = config.max_position_embeddings
        self.max_seq_len = max_seq_len or longest
        require(
            0 < self.max_seq_len <= longest,
            "max_seq_len",
            max_seq_len,
            f"must be from 1 to the model's max_position_embeddings {longest}",
            f"use {longest} or less",
        )
        self._attached = attention.AttachedAttention()
        num_attached = self._attached.attach_to(self)
        num_layers = len(self.layers)
        must = f"has {num_layers} layers, and {num_attached} of them have an attention known here"
        name = type(self).__name__.removeprefix("Packed")
        require(num_attached == num_layers, "model", name, must, _REMEDY)
        self.windows = _windows(config)
        self.head_form = _head_form(config)

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, in their order."""
        return self.base_model.layers

    @property
    def tok_embeddings(self) -> nn.Module:
        """The embedding, with its weight [V, H]."""
        return self.get_input_embeddings()

    @property
    def output(self) -> nn.Module:
        """The head, whose weight [V, H] is the embedding's when they are tied."""
        return self.get_output_embeddings()

    @property
    def norm(self) -> nn.Module:
        """The norm after the last layer."""
        return self.base_model.norm

    @property
    def attention_sizes(self) -> AttentionSizes:
        """The sizes of a layer's attention."""
        config = self.config.get_text_config()
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        return AttentionSizes(num_heads, config.num_key_value_heads, head_dim)

    def keep_layers(self, count: int) -> None:
        """Leave the first layers alone."""
        self.base_model.layers = self.base_model.layers[:count]
        self.config.get_text_config().num_hidden_layers = count

    def use_attention(self, function: Any) -> None:
        """Let every layer attend with a function that takes what ``attend`` does."""
        self._attached.function = function

    def remember_keys(self, function: Any) -> None:
        """Let every layer attend to the keys and values that a function returns for its own."""
        self._attached.remember = function

    def forward(
        self,
        tokens: Tensor,  # [R, S]
        *,
        mask: dict[int | None, Any],  # of each of ``windows``
        input_pos: Tensor,  # [R, S] positions in the document
    ) -> Tensor:  # [R, S, H]
        """Return normalised hidden states."""
        self._attached.masks = mask
        output = self.base_model(input_ids=tokens, position_ids=input_pos, use_cache=False)
        return output.last_hidden_state

    @torch.no_grad()
    def init_buffers(self) -> None:
        """Compute the buffers that are not part of a state dict, on the device they are on."""
        modules: Any = self.modules()
        for module in modules:
            if module._non_persistent_buffers_set and not _has_parameters(module):
                self._init_weights(module)
            elif hasattr(module, "scalar_embed_scale"):  # of an embedding that scales
                module.embed_scale.fill_(module.scalar_embed_scale)

    def incremental(self, *, max_prefill_tokens: int) -> IncrementalCausalLM:
        """Return the model's own forward over a cache, which shares the parameters."""
        return IncrementalCausalLM(self, max_prefill_tokens=max_prefill_tokens)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _windows(config: Any) -> tuple[int | None, ...]:
    """Return the windows of the layers, None for those that have none, each once."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,)
    windows = []
    for kind in kinds:
        of_kind = window if _LAYER_TYPES[kind] else None
        if of_kind not in windows:
            windows.append(of_kind)
    return tuple(windows)


def _head_form(config: Any) -> HeadForm:
    softcap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        divisor = 1.0 / scale
    return HeadForm(divisor=float(divisor), softcap=softcap)
