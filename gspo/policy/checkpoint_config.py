"""The decoder that a config builds, compared with the ``config.json`` beside its weights.

Shapes of weights show some of the differences. These they do not: with another ``rope_base``,
``scale_factor``, ``norm_eps`` or number of heads of the same width, all weights fit and the model
is another.

Needs no weights, and takes decoders on the meta device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torchtune.modules import TransformerDecoder

from gspo.config import Settings, refusals
from gspo.data.pack import check_bin_length
from gspo.decoder import attention_sizes
from gspo.errors import NO_VALUE, InputError, raise_all, require

_SWITCH = "or set check_model_config=false to go on as it is"
# Scalings that leave positions up to the model's trained length as they are.
_PLAIN_SCALINGS = {"default", "dynamic"}
SMALLEST_HEAD_DIM = 16  # of FlexAttention's kernels
# Argument of torchtune's builders -> key of config.json.
_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "embed_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "rope_base": "rope_theta",
}
# Argument of Llama3ScaledRoPE, beside scale_factor -> key of config.json's rope_scaling.
_LLAMA3_KEYS = {
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}


class _Pair(NamedTuple):
    """A value of both sides."""

    argument: str  # of the builder
    key: str  # of config.json
    built: Any
    stated: Any


def check_decoder(decoder: Any, cfg: Settings, key: str = "checkpointer") -> None:
    """Refuse a decoder that fits neither the bins nor its checkpoint.

    Args:
        decoder: as built, on any device.
        cfg: the run's.
        key: of the checkpointer that its weights come from.

    Raises:
        InputError: See :func:`gspo.data.pack.check_bin_length` and :func:`check_model_config`; or
            its heads are too small for FlexAttention on a GPU.
    """
    with refusals("packing"):
        check_bin_length(cfg.packing.bin_length, decoder.max_seq_len)
    if cfg.on_cuda:
        _check_head_dim(decoder)
    # A decoder of another library is built from that config.json itself.
    if cfg.check_model_config and isinstance(decoder, TransformerDecoder):
        check_model_config(decoder, getattr(cfg, key))


def _check_head_dim(decoder: Any) -> None:
    head_dim = attention_sizes(decoder).head_dim
    require(
        head_dim >= SMALLEST_HEAD_DIM,
        "model",
        head_dim,
        f"is its head dimension; FlexAttention on a GPU takes {SMALLEST_HEAD_DIM} or more",
        "make it wider or give it fewer heads, or set device=cpu",
    )


def check_model_config(decoder: TransformerDecoder, checkpointer: Mapping[str, Any]) -> None:
    """Refuse a decoder that is not the one that its checkpoint was made for.

    Args:
        decoder: as built, on any device.
        checkpointer: the config's; one without a ``checkpoint_dir``, or whose folder has no
            ``config.json``, has nothing to compare.

    Raises:
        InputError: Values that both state differ.
    """
    folder = checkpointer.get("checkpoint_dir")
    if not isinstance(folder, str):
        return
    file = Path(folder, "config.json")
    if not file.is_file():  # torchtune's and Meta's formats have none
        return
    stated = _read(file)
    problems = []
    for pair in _pairs(decoder, stated):
        if not _equal(pair.built, pair.stated):
            problems.append(_difference(pair, file))
    problem = _unknown_scaling(stated, file)
    if problem is not None:
        problems.append(problem)
    raise_all(problems)


def _read(file: Path) -> dict[str, Any]:
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(str(file), NO_VALUE, f"cannot be read: {error}", "get it again") from error
    require(isinstance(stated, dict), str(file), stated, "is no JSON object", "get it again")
    return stated


def _pairs(decoder: TransformerDecoder, stated: Mapping[str, Any]) -> list[_Pair]:
    """Return what both sides state; what is null or missing on one side is no difference."""
    rope = _rope_of(stated)
    values = {**stated, **rope}
    pairs = []
    for argument, built in _built(decoder).items():
        key = _KEYS[argument]
        if built is not None and values.get(key) is not None:
            pairs.append(_Pair(argument, key, built, values[key]))
    return pairs + _scaling_pairs(decoder, rope)


def _scaling_pairs(decoder: TransformerDecoder, rope: Mapping[str, Any]) -> list[_Pair]:
    """Return the scaling of positions; a config that names none has a factor of 1."""
    position = decoder.layers[0].attn.pos_embeddings
    built = getattr(position, "scale_factor", 1)
    is_scaled = _scaling_type(rope) == "llama3"
    stated = rope.get("factor", 1) if is_scaled else 1
    pairs = [_Pair("scale_factor", "rope_scaling.factor", built, stated)]
    if is_scaled and built != 1:
        for argument, key in _LLAMA3_KEYS.items():
            value = getattr(position, argument, None)
            if value is not None and rope.get(key) is not None:
                pairs.append(_Pair(argument, f"rope_scaling.{key}", value, rope[key]))
    return pairs


def _built(decoder: TransformerDecoder) -> dict[str, Any]:
    """Return the decoder's values by the builder's argument; None for what it does not show."""
    layer = decoder.layers[0]
    attention = layer.attn
    gate = getattr(layer.mlp, "w1", None)
    return {
        "num_layers": len(decoder.layers),
        "num_heads": getattr(attention, "num_heads", None),
        "num_kv_heads": getattr(attention, "num_kv_heads", None),
        "head_dim": getattr(attention, "head_dim", None),
        "embed_dim": getattr(attention, "embed_dim", None),
        "intermediate_dim": getattr(gate, "out_features", None),
        "vocab_size": getattr(decoder.tok_embeddings, "num_embeddings", None),
        "norm_eps": getattr(layer.sa_norm, "eps", None),
        "tie_word_embeddings": hasattr(decoder.output, "tied_module"),
        "rope_base": getattr(attention.pos_embeddings, "base", None),
    }


def _rope_of(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said about positions: transformers 5 has it all in ``rope_parameters``."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = stated.get(key)
        if isinstance(part, dict):
            rope |= part
    return rope


def _scaling_type(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _unknown_scaling(stated: Mapping[str, Any], file: Path) -> InputError | None:
    """Return a refusal of a scaling that no builder of torchtune has."""
    kind = _scaling_type(_rope_of(stated))
    if kind == "llama3" or kind in _PLAIN_SCALINGS:
        return None
    return InputError(
        "model",
        kind,
        f"is the rope_scaling in {file}, which torchtune's decoders lack",
        f"take another checkpoint, {_SWITCH}",
    )


def _equal(built: Any, stated: Any) -> bool:
    numbers = isinstance(built, int | float) and isinstance(stated, int | float)
    return math.isclose(built, stated, rel_tol=1e-6) if numbers else built == stated


def _difference(pair: _Pair, file: Path) -> InputError:
    return InputError(
        f"model.{pair.argument}",
        pair.built,
        f"must be {pair.stated!r}, as {pair.key} in {file}",
        f"set model.{pair.argument}, name the checkpoint's own builder, {_SWITCH}",
    )
