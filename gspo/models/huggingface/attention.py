"""The attention that every layer of a transformers model calls, by the name ``gspo``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from gspo.errors import InputError

NAME = "gspo"
_ATTACHED = "_gspo_attention"
# What layers pass that changes nothing here: positions are in the masks, the library's cache is not
# used, and no weights of attention are returned.
_OF_NO_EFFECT = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "is_causal",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


class AttachedAttention:
    """The function that the layers of one decoder attend with, and their masks.

    A model hands masks to its layers in a way of its own, and makes them for one document a row. So
    they come past it.
    """

    def __init__(self) -> None:
        self.function: Callable[..., Tensor] | None = None  # see gspo.policy.attention.attend
        self.masks: dict[int | None, Any] = {}  # by window
        # Takes a layer's index and its new keys and values, and returns those to attend to.
        self.remember: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def attach_to(self, model: nn.Module) -> int:
        """Let the attention modules of a model find this, and return how many they are.

        Raises:
            InputError: They have parameters of their own, such as sinks.
        """
        count = 0
        for module in model.modules():
            if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
                _check_no_parameters(module)
                setattr(module, _ATTACHED, self)
                count += 1
        return count


def _check_no_parameters(module: nn.Module) -> None:
    """Refuse attention that does more than its projections and norms say."""
    for name, _ in module.named_parameters(recurse=False):
        must = f"attends by a parameter of its own, {name}, which is not known here"
        raise InputError("model", type(module).__name__, must, "choose a model without it")


def _attention(
    module: nn.Module,
    query: Tensor,  # [R, heads, S, head_dim]
    key: Tensor,  # [R, key heads, S, head_dim]
    value: Tensor,
    attention_mask: Any,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # [R, S, heads, head_dim], and no weights
    """Attend as the decoder that the module belongs to was told."""
    for name, option in options.items():
        if option is not None and name not in _OF_NO_EFFECT:
            raise InputError(
                "model",
                type(module).__name__,
                f"asks its attention for {name}, which is not known here",
                "choose a model without it",
            )
    attached: AttachedAttention = getattr(module, _ATTACHED)
    assert attached.function is not None
    if attached.remember is not None:
        index: Any = module.layer_idx
        key, value = attached.remember(index, key, value)
    mask = attached.masks[sliding_window]
    attended = attached.function(
        query,
        key,
        value,
        mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        softcap=softcap,
    )
    return attended.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
