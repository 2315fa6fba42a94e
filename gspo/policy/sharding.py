"""Shard a policy with FSDP2 and give it its weights. One rank is no exception."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtune import training

from gspo.decoder import init_buffers, unique_state
from gspo.errors import InputError
from gspo.losses.inputs import Loss
from gspo.parallel.mesh import Ranks
from gspo.policy.model import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """The settings of how a policy computes and where its weights lie."""

    kernel: str = "auto"
    head_chunk_size: int | None = None
    activation_checkpointing: bool = False
    compile_layers: bool = False
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    adapter_seed: int = 0  # of adapters that are new


def build_policy(
    decoder: Any,
    weights: dict[str, Tensor],
    loss: Loss | None,
    *,
    ranks: Ranks,
    device: torch.device,
    options: PolicyOptions,
    key: str = "checkpointer",
) -> Policy:
    """Make a sharded policy with the weights of a checkpoint.

    Args:
        decoder: on the meta device.
        weights: by the checkpoint's names, and those of adapters that are there by their own.
        loss: what it trains with; None for a policy that is only evaluated.
        ranks: over which it is sharded.
        device: this rank's.
        options: see there.
        key: of the config, that the weights come from.

    Raises:
        InputError: The weights are not those of the decoder, or not finite.
    """
    policy = Policy(
        decoder,
        loss,
        chunk_size=options.head_chunk_size,
        kernel=options.kernel,
        context=ranks.context,
    )
    shard_policy(
        policy,
        ranks.fsdp_mesh,
        activation_checkpointing=options.activation_checkpointing and loss is not None,
        compile_layers=options.compile_layers,
        reshard_after_forward=options.reshard_after_forward,
        cpu_offload=options.cpu_offload,
    )
    load_weights(
        policy,
        weights,
        device,
        cpu_offload=options.cpu_offload,
        adapter_seed=options.adapter_seed,
        key=key,
    )
    return policy


def shard_policy(
    policy: Policy,
    mesh: DeviceMesh,
    *,
    activation_checkpointing: bool = False,
    compile_layers: bool = False,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shard a policy in place with FSDP2, layer by layer, with float32 reductions.

    Args:
        policy: not sharded yet.
        mesh: see :attr:`gspo.parallel.Ranks.fsdp_mesh`.
        activation_checkpointing: keep the input of each layer alone.
        compile_layers: compile each layer.
        reshard_after_forward: free gathered weights between forward and backward.
        cpu_offload: keep the shards in the host's memory.
    """
    if compile_layers:
        backend = os.environ.get("TORCH_COMPILE_BACKEND", "inductor")  # as torchtune has it
        for layer in policy.decoder.layers:
            layer.compile(backend=backend)
    if activation_checkpointing:
        kinds = {type(layer) for layer in policy.decoder.layers}
        training.set_activation_checkpointing(policy.decoder, auto_wrap_policy=kinds)
    fsdp: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
    }
    if cpu_offload:
        fsdp["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for layer in policy.decoder.layers:
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **fsdp)
    fully_shard(policy, **fsdp)
    register_fsdp_forward_method(policy, "_logps")


def load_weights(
    policy: Policy,
    state_dict: dict[str, Tensor],
    device: torch.device,
    *,
    cpu_offload: bool = False,
    adapter_seed: int = 0,
    key: str = "checkpointer",
) -> None:
    """Give a policy that was built on the meta device its memory and its weights. Collective.

    Args:
        policy: sharded.
        state_dict: whole weights, see :func:`build_policy`.
        device: this rank's.
        cpu_offload: the shards lie in the host's memory.
        adapter_seed: of adapters that are new.
        key: of the config, that the weights come from.

    Raises:
        InputError: Names or shapes are not those of the decoder, or, on every rank, a weight is not
            finite.
    """
    decoder = policy.decoder
    adapters = policy.adapters
    in_checkpoint = {k: v for k, v in state_dict.items() if k not in adapters.trained}
    _check_weights(adapters.plain_state(unique_state(decoder)), in_checkpoint)
    policy.to_empty(device="cpu" if cpu_offload else device)
    init_buffers(decoder, device)
    with torch.no_grad():
        parameters = unique_state(decoder)
        for name, value in adapters.values(parameters, state_dict, adapter_seed):
            _fill_shard(parameters[name], value)
    training.validate_no_params_on_meta_device(policy)
    check_weights(
        policy,
        device,
        key,
        "in the checkpoint",
        "load weights that are finite: the run that saved these had diverged, or a file is damaged",
    )


def _fill_shard(parameter: Tensor, weight: Tensor) -> None:
    """Copy this rank's part of a whole weight into its shard, in the shard's dtype."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(weight)
        return
    local = parameter.to_local()
    whole = weight.to(local.device, local.dtype)
    # Every rank has the whole weight: nothing is sent.
    shard = distribute_tensor(
        whole, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    local.copy_(shard.to_local())


def check_weights(policy: Policy, device: torch.device, key: str, place: str, remedy: str) -> None:
    """Refuse weights that are not finite. Collective, with the same verdict on every rank.

    Args:
        policy: sharded.
        device: this rank's, for the counts that are added up.
        key: of the config, whose value caused it.
        place: where the weights are so, for the message.
        remedy: for the message.

    Raises:
        InputError: It names the first such parameter, and how many of its values are not finite.
    """
    weights = unique_state(policy.decoder)
    counts = []
    for weight in weights.values():
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        num_finite = local.isfinite().sum()
        num_not_finite = local.numel() - num_finite
        counts.append(num_not_finite / _num_copies(weight))
    totals = torch.stack(counts).to(device, torch.float64)
    dist.all_reduce(totals)
    for (name, weight), total in zip(weights.items(), totals.tolist(), strict=True):
        if total:
            must = f"has {total:.0f} of {weight.numel()} values that are not finite, {place}"
            raise InputError(key, name, must, remedy)


def _num_copies(weight: Tensor) -> int:
    """Return how many ranks hold the same part of a weight."""
    if not isinstance(weight, DTensor):
        return dist.get_world_size()
    mesh = weight.device_mesh
    return mesh.size(0) if mesh.ndim == 2 else 1  # replicate before shard


def _check_weights(in_model: dict[str, Tensor], in_checkpoint: dict[str, Tensor]) -> None:
    for name in sorted(in_model.keys() | in_checkpoint.keys()):
        model_shape = _shape(in_model, name)
        checkpoint_shape = _shape(in_checkpoint, name)
        if model_shape != checkpoint_shape:
            raise InputError(
                "model",
                name,
                f"is {model_shape} in the model and {checkpoint_shape} in the checkpoint",
                "name the builder, with its arguments, that the checkpoint was made for",
            )
    for name, weight in in_checkpoint.items():
        if not weight.is_floating_point():  # copying would turn codes into weights
            raise InputError(
                "checkpointer",
                name,
                f"is of {weight.dtype} in the checkpoint, which is no number of a weight",
                "take a checkpoint that is not quantized",
            )


def _shape(weights: dict[str, Tensor], name: str) -> list[int] | str:
    return list(weights[name].shape) if name in weights else "missing"
