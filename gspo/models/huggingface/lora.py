"""A causal language model of ``transformers`` with adapters of ``peft``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gspo.adapters.nf4 import NF4Linear
from gspo.compat import modules_stay_where_they_are
from gspo.errors import InputError, first_line
from gspo.models.huggingface.causal_lm import as_decoder, build_model, naming_the_path


def lora_causal_lm(
    path: str,
    *,
    lora_rank: int = 16,
    lora_alpha: float = 32,
    target_modules: str | Sequence[str] = "all-linear",
    use_dora: bool = False,
    quantize_base: bool = False,
    max_seq_len: int | None = None,
) -> Any:
    """Build a model with adapters, without its weights, on the default device and in its dtype.

    Args:
        path: see :func:`gspo.models.huggingface.causal_lm`.
        lora_rank: r of ``W + alpha / r * B A``.
        lora_alpha: alpha.
        target_modules: names of the linear maps that are adapted, such as ``["q_proj", "v_proj"]``;
            all-linear for all of the layers.
        use_dora: train the norms of the rows too (https://arxiv.org/abs/2402.09353).
        quantize_base: keep the adapted maps' own weights in 4 bits, see :mod:`gspo.adapters.nf4`.
        max_seq_len: see :func:`gspo.models.huggingface.causal_lm`.

    Raises:
        InputError: There is no such folder, documents cannot be packed for the model, or it has no
            such linear maps.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an extra, which other models do without

    model = build_model(path)
    names = target_modules if isinstance(target_modules, str) else list(target_modules)
    try:
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora_rank,
            lora_alpha=lora_alpha,
            target_modules=names,
            use_dora=use_dora,
        )
        with modules_stay_where_they_are():
            inject_adapter_in_model(config, model)
    except (TypeError, ValueError) as error:
        raise InputError(
            "model",
            f"lora_rank={lora_rank}, target_modules={names}",
            f"is not taken by peft: {first_line(error)}",
            "correct the arguments of lora_causal_lm",
        ) from error
    if quantize_base:
        _quantize_base(model)
    with naming_the_path(path):
        return as_decoder(model, max_seq_len=max_seq_len)


def _quantize_base(model: nn.Module) -> None:
    """Keep the weights of adapted maps in 4 bits."""
    for module in list(model.modules()):
        base: Any = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            weight = base.weight
            quantized = NF4Linear(
                base.in_features,
                base.out_features,
                bias=base.bias,
                dtype=weight.dtype,
                device=weight.device,
            )
            module.base_layer = quantized
