"""The process group, and what a rank is: which prompts it draws, its shard, its context group.

World size 1 takes the same path as any other. Not here: how a microbatch is split over a context
axis (:mod:`gspo.parallel.context`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchtune import utils

from gspo.errors import InputError, require
from gspo.parallel.context import ContextAxis


def find_device(name: str) -> torch.device:
    """Return this rank's device of the type ``name``.

    Raises:
        InputError: There is none. torchtune's own function would take the CPU instead.
    """
    try:
        device = utils.get_device(name)
    except RuntimeError as error:
        remedy = "name the type of a device that this machine has"
        raise InputError("device", name, f"is refused: {error}", remedy) from error
    remedy = "use cpu or cuda"
    require(device.type != "meta", "device", name, "holds no values to train", remedy)
    require(
        torch.device(name).type == device.type,
        "device",
        name,
        "is not on this machine",
        f"set device to {device.type}, or install its torch",
    )
    return device


def init_process_group(device: torch.device) -> None:
    """Join the processes that torchrun started, or make a group of one without opening a port.

    Raises:
        InputError: The rendezvous address is in use or cannot be reached.
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
            "MASTER_ADDR:MASTER_PORT",
            address,
            f"is where the ranks could not meet: {str(error).splitlines()[0]}",
            "choose a free port with `tune run --rdzv_endpoint HOST:PORT ...`, or stop the process "
            "that holds it",
        ) from error


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run on a mesh with the axes ``replicate``, ``shard`` and ``context``.

    Parameters are sharded over ``shard`` x ``context`` and replicated over ``replicate`` (HSDP). A
    microbatch is split over ``context``; every other coordinate draws prompts of its own.
    """

    mesh: DeviceMesh

    @classmethod
    def of(cls, device: torch.device, *, replicate: int = 1, context: int = 1) -> Ranks:
        """Make the mesh over all ranks of the process group.

        Args:
            device: this rank's device.
            replicate: replicas of the parameters.
            context: ranks that share a microbatch.

        Raises:
            InputError: The sizes do not divide the number of ranks.
        """
        world_size = dist.get_world_size()
        product = replicate * context
        if replicate < 1 or context < 1 or world_size % product:
            raise InputError(
                "data_parallel_replicate_size",
                replicate,
                f"x context_parallel_size {context} = {product}, which does not divide the "
                f"{world_size} ranks of this run",
                f"change one of them, or start a multiple of {product} ranks with "
                "`tune run --nproc_per_node`",
            )
        shape = (replicate, world_size // product, context)
        names = ("replicate", "shard", "context")
        return cls(init_device_mesh(device.type, shape, mesh_dim_names=names))

    @property
    def rank(self) -> int:
        """This process's number among all."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return dist.get_world_size()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what a run writes once."""
        return self.rank == 0

    @cached_property
    def context(self) -> ContextAxis:
        """The ranks that share this rank's microbatches."""
        axis = self.mesh["context"]
        return ContextAxis(axis.get_group(), axis.get_local_rank(), axis.size())

    @property
    def draws(self) -> bool:
        """Whether this rank draws prompts; the others of its context axis train on the same."""
        return self.context.rank == 0

    @property
    def num_data_ranks(self) -> int:
        """The number of ranks that draw different prompts."""
        return self.mesh["replicate"].size() * self.mesh["shard"].size()

    @property
    def data_rank(self) -> int:
        """This rank's number among those that draw different prompts."""
        num_shards = self.mesh["shard"].size()
        replica = self.mesh["replicate"].get_local_rank()
        return replica * num_shards + self.mesh["shard"].get_local_rank()

    @property
    def data_share(self) -> dict[str, int]:
        """``rank`` and ``world_size`` among the ranks that draw different prompts."""
        return {"rank": self.data_rank, "world_size": self.num_data_ranks}

    @property
    def share(self) -> dict[str, int]:
        """``rank`` and ``world_size`` among all ranks."""
        return {"rank": self.rank, "world_size": self.world_size}

    @property
    def num_shards(self) -> int:
        """The number of parts that parameters are cut into."""
        return self.mesh["shard"].size() * self.mesh["context"].size()

    @property
    def shard_index(self) -> int:
        """The part of the parameters that this rank holds; the same on every replica."""
        return self.rank % self.num_shards

    @cached_property
    def fsdp_mesh(self) -> DeviceMesh:
        """The mesh that FSDP2 takes: the axis to shard over, after ``replicate`` if above 1."""
        replicas = self.mesh["replicate"].size()
        if replicas == 1:
            return init_device_mesh(
                self.mesh.device_type, (self.num_shards,), mesh_dim_names=("shard",)
            )
        shape = (replicas, self.num_shards)
        return init_device_mesh(self.mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))


def sum_over_ranks(counts: Sequence[int], device: torch.device) -> list[int]:
    """Return each count summed over all ranks. Collective.

    Args:
        counts: as many on every rank.
        device: of the tensor that is reduced.
    """
    total = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return total.tolist()
