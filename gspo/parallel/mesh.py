"""The process group, the mesh, counts over it, and optimizer steps. World size 1 takes the same path as any other.

Not here: how a microbatch is split over the context axis (:mod:`gspo.context`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchtune import utils

from gspo.errors import InputError


def find_device(name: str) -> torch.device:
    """This rank's device of the type ``name``.

    Raises:
        InputError: there is none. torchtune's own function would take the CPU instead.
    """
    try:
        device = utils.get_device(name)
    except RuntimeError as error:
        raise InputError(
            f"device: {name!r}: {error}. Name the type of a device that this machine has."
        ) from error
    if torch.device(name).type != device.type:
        raise InputError(
            f"device: {name!r} is not on this machine. Set device to {device.type}, or install its torch."
        )
    return device


def init_process_group(device: torch.device) -> None:
    """Joins the processes that torchrun started, or makes a group of one without opening a port.

    Raises:
        InputError: the rendezvous address is in use or cannot be reached.
    """
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        dist.init_process_group(backend)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            f"The ranks could not meet at MASTER_ADDR:MASTER_PORT = {address}: {str(error).splitlines()[0]} "
            "Choose a free port with `tune run --rdzv_endpoint HOST:PORT ...`, or stop the process that holds it."
        ) from error


def build_mesh(
    device: torch.device, *, data_parallel_replicate_size: int = 1, context_parallel_size: int = 1
) -> DeviceMesh:
    """A mesh with the axes ``replicate``, ``shard`` and ``context`` over all ranks.

    Parameters are sharded over ``shard`` x ``context`` and replicated over ``replicate`` (HSDP). A microbatch is split
    over ``context``.

    Raises:
        InputError: the sizes do not divide the number of ranks.
    """
    world_size = dist.get_world_size()
    sizes = data_parallel_replicate_size * context_parallel_size
    if data_parallel_replicate_size < 1 or context_parallel_size < 1 or world_size % sizes:
        raise InputError(
            f"data_parallel_replicate_size {data_parallel_replicate_size} x context_parallel_size "
            f"{context_parallel_size} = {sizes}, which does not divide the {world_size} ranks of this run: change one "
            f"of them, or start a multiple of {sizes} ranks with `tune run --nproc_per_node`."
        )
    shape = (data_parallel_replicate_size, world_size // sizes, context_parallel_size)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard", "context"))


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that FSDP2 takes: one axis to shard over, with ``replicate`` before it when that is larger than 1."""
    replicas, shards, contexts = mesh.shape
    if replicas == 1:
        return init_device_mesh(mesh.device_type, (shards * contexts,), mesh_dim_names=("shard",))
    return init_device_mesh(
        mesh.device_type, (replicas, shards * contexts), mesh_dim_names=("replicate", "shard")
    )


def data_parallel_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's place among those that draw different prompts, and how many there are."""
    replicas, shards, _ = mesh.shape
    rank = mesh["replicate"].get_local_rank() * shards + mesh["shard"].get_local_rank()
    return rank, replicas * shards


def sum_over_ranks(counts: Sequence[int], device: torch.device) -> list[int]:
    """Each count summed over all ranks."""
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return total.tolist()
