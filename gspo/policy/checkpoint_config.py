"""The decoder that a config builds, compared with the ``config.json`` beside its weights.

Shapes of weights show some of the differences. These they do not: with another ``rope_base``,
``scale_factor``, ``norm_eps`` or number of heads of the same width, all weights fit and the model
is another.

Needs no weights, and takes decoders on the meta device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torchtune.modules import TransformerDecoder

from gspo.config import Settings, refusals
from gspo.data.pack import check_bin_length
from gspo.decoder import attention_sizes
from gspo.errors import NO_VALUE, InputError, raise_all, require

_SWITCH = "or set check_model_config=false to go on as it is"
_OTHER_LIBRARY = "take gspo.models.huggingface.causal_lm, which has it"
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
        longest = cfg.packing.longest_document
        longest_prompt = cfg.prompts.get("max_prompt_tokens")
        if isinstance(longest_prompt, int):
            longest = min(longest, longest_prompt + cfg.sampling.max_new_tokens)
        check_model_config(decoder, getattr(cfg, key), longest_document=longest)


def _check_head_dim(decoder: Any) -> None:
    head_dim = attention_sizes(decoder).head_dim
    require(
        head_dim >= SMALLEST_HEAD_DIM,
        "model",
        head_dim,
        f"is its head dimension; FlexAttention on a GPU takes {SMALLEST_HEAD_DIM} or more",
        "make it wider or give it fewer heads, or set device=cpu",
    )


def check_model_config(
    decoder: TransformerDecoder,
    checkpointer: Mapping[str, Any],
    *,
    longest_document: int | None = None,
) -> None:
    """Refuse a decoder that is not the one that its checkpoint was made for.

    Args:
        decoder: as built, on any device.
        checkpointer: the config's; one without a ``checkpoint_dir``, or whose folder has no
            ``config.json``, has nothing to compare.
        longest_document: in tokens; None for one of the decoder's longest bin.

    Raises:
        InputError: Values that both state differ, or the model does what the decoder cannot.
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
    longest = longest_document or decoder.max_seq_len + 1
    problems += [*_position_problems(stated, file), *_window_problems(stated, file, longest)]
    if hasattr(decoder.norm, "logit_capping"):
        problems.append(_gemma2_problem())
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


def _position_problems(stated: Mapping[str, Any], file: Path) -> Iterator[InputError]:
    """Yield refusals of positions that no builder of torchtune has."""
    rope = _rope_of(stated)
    kind = _scaling_type(rope)
    if kind != "llama3" and kind not in _PLAIN_SCALINGS:
        yield InputError(
            "model",
            kind,
            f"is the rope_scaling in {file}, which torchtune's decoders lack",
            f"take another checkpoint, {_SWITCH}",
        )
    share = {**stated, **rope}.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        must = f"is the partial_rotary_factor in {file}, and torchtune's decoders turn whole heads"
        yield InputError("model", share, must, f"{_OTHER_LIBRARY}, {_SWITCH}")


def _window_problems(
    stated: Mapping[str, Any], file: Path, longest_document: int
) -> Iterator[InputError]:
    """Yield a refusal of documents that are longer than the model's window, if it has one."""
    window = stated.get("sliding_window")
    has_window = isinstance(window, int) and stated.get("use_sliding_window") is not False
    num_slots = longest_document - 1  # the last token is a label alone
    if has_window and num_slots > window:
        must = f"is the sliding_window in {file}; torchtune's decoders attend beyond it, and "
        must += f"documents may have {longest_document} tokens"
        shorter = "lower prompts.max_prompt_tokens and sampling.max_new_tokens"
        yield InputError("model", window, must, f"{_OTHER_LIBRARY}, {shorter}, {_SWITCH}")


def _gemma2_problem() -> InputError:
    must = (
        "is Gemma 2 as torchtune has it: it caps hidden states in the place of logits, and swaps "
    )
    must += "the norms before and behind each MLP"
    return InputError("model", "gemma2", must, f"{_OTHER_LIBRARY}, {_SWITCH}")


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
