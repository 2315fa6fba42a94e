"""Shard a policy with FSDP2 and give it its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from gspo.errors import InputError
from gspo.policy.model import Policy


def shard_policy(
    policy: Policy,
    mesh: DeviceMesh,
    *,
    activation_checkpointing: bool = False,
    compile_layers: bool = False,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shards a policy in place with FSDP2, layer by layer, with float32 reductions. One rank is no exception."""
    if compile_layers:
        training.compile_model(policy.decoder, verbose=False)
    if activation_checkpointing:
        training.set_activation_checkpointing(
            policy.decoder, auto_wrap_policy={TransformerSelfAttentionLayer}
        )
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for layer in policy.decoder.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(policy, **options)
    register_fsdp_forward_method(policy, "_logps")


def load_weights(
    policy: Policy,
    state_dict: dict[str, Tensor],
    device: torch.device,
    *,
    cpu_offload: bool = False,
) -> None:
    """Gives a policy built on the meta device its memory and the weights of ``state_dict`` (torchtune's names).

    Raises:
        InputError: names or shapes are not those of the decoder.
    """
    _check_weights(state_dict, policy.decoder.state_dict())
    policy.to_empty(device="cpu" if cpu_offload else device)
    with device:
        for module in policy.modules():
            if hasattr(module, "rope_init"):  # not part of a state dict
                module.rope_init()
    training.load_from_full_model_state_dict(
        policy.decoder, state_dict, device, strict=True, cpu_offload=cpu_offload
    )
    training.validate_no_params_on_meta_device(policy)


def _check_weights(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in sorted(found.keys() | wanted.keys()):
        ours, theirs = (
            list(weights[name].shape) if name in weights else "missing"
            for weights in (wanted, found)
        )
        if ours != theirs:
            raise InputError(
                f"model: {name} is {ours} in the model and {theirs} in the checkpoint. "
                "Name the builder, with its arguments, that the checkpoint was made for."
            )
