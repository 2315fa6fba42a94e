"""The process group, the device mesh, and counts summed over it. World size 1 takes the same path as any other.

Not here: context parallelism's sharding of a microbatch; its axis of the mesh exists and has size 1.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchtune import utils

from gspo.data.packing import pack_documents
from gspo.errors import InputError
from gspo.types import PackedBatch

logger = logging.getLogger(__name__)

WARN_EMPTY_ROUNDS = 10
MAX_EMPTY_ROUNDS = 200  # of a step: a run that finds nothing to learn from ends instead of sampling for ever


def find_device(name: str) -> torch.device:
    """This rank's device of the type ``name``.

    Raises:
        InputError: there is none. torchtune's own function would take the CPU instead.
    """
    try:
        device = utils.get_device(name)
    except RuntimeError as error:
        raise InputError(f"device: {name!r}: {error}. Name the type of a device that this machine has.") from error
    if torch.device(name).type != device.type:
        raise InputError(f"device: {name!r} is not on this machine. Set device to {device.type}, or install its torch.")
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


def build_mesh(device: torch.device, *, data_parallel_replicate_size: int = 1) -> DeviceMesh:
    """A mesh with the axes ``replicate``, ``shard`` and ``context`` over all ranks.

    Parameters are sharded over ``shard`` x ``context`` and replicated over ``replicate`` (HSDP).

    Raises:
        InputError: ``data_parallel_replicate_size`` does not divide the number of ranks.
    """
    world_size = dist.get_world_size()
    if data_parallel_replicate_size < 1 or world_size % data_parallel_replicate_size:
        raise InputError(
            f"data_parallel_replicate_size is {data_parallel_replicate_size}, which does not divide the "
            f"{world_size} ranks of this run: choose a divisor of {world_size}."
        )
    shape = (data_parallel_replicate_size, world_size // data_parallel_replicate_size, 1)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard", "context"))


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that FSDP2 takes: one axis to shard over, with ``replicate`` before it when that is larger than 1."""
    replicas, shards, contexts = mesh.shape
    if replicas == 1:
        return init_device_mesh(mesh.device_type, (shards * contexts,), mesh_dim_names=("shard",))
    return init_device_mesh(mesh.device_type, (replicas, shards * contexts), mesh_dim_names=("replicate", "shard"))


def data_parallel_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's place among those that draw different prompts, and how many there are."""
    replicas, shards, _ = mesh.shape
    rank = mesh["replicate"].get_local_rank() * shards + mesh["shard"].get_local_rank()
    return rank, replicas * shards


def sum_over_ranks(counts: list[int], device: torch.device) -> list[int]:
    """Each count summed over all ranks."""
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is True on any rank."""
    return sum_over_ranks([int(flag)], device)[0] > 0


@dataclass(frozen=True, slots=True)
class StepBatches:
    """The microbatches of one optimizer step on this rank, and the totals over all ranks and microbatches."""

    batches: list[PackedBatch]
    num_documents: int
    num_label_tokens: int


def fetch_step(source: Iterator[PackedBatch], *, docs_per_step: int, device: torch.device) -> StepBatches | None:
    """Draws microbatches on every rank until their global document count reaches ``docs_per_step``.

    All ranks take the same number of microbatches, so their collectives stay paired; one whose source has ended goes
    along with empty ones. The count may overshoot by what the last round brings. Collective.

    Returns:
        None when every source has ended before a document was drawn.

    Raises:
        InputError: on every rank, after :data:`MAX_EMPTY_ROUNDS` in a row without a document.
    """
    batches: list[PackedBatch] = []
    num_documents = num_label_tokens = num_empty_rounds = 0
    while num_documents < docs_per_step:
        batch = next(source, None)
        present = batch is not None
        if batch is None:
            batch = pack_documents([])
        documents, tokens, sources = sum_over_ranks([batch.num_documents, batch.num_label_tokens, present], device)
        if not sources:
            break
        num_empty_rounds = 0 if documents else num_empty_rounds + 1
        if num_empty_rounds == WARN_EMPTY_ROUNDS and dist.get_rank() == 0:
            logger.warning("Waiting for groups whose rewards differ: %d microbatches had none.", num_empty_rounds)
        if num_empty_rounds == MAX_EMPTY_ROUNDS:
            raise InputError(
                f"docs_per_step: {docs_per_step} is out of reach, {MAX_EMPTY_ROUNDS} microbatches in a row brought no "
                "document. With advantages.refill_dead_groups, no group has rewards that differ: set it to false, or "
                "give prompts of which the policy solves some."
            )
        batches.append(batch)
        num_documents += documents
        num_label_tokens += tokens
    return StepBatches(batches, num_documents, num_label_tokens) if num_documents else None
