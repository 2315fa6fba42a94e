"""The process group, and what a rank is: which prompts it draws, its shard, its context group.

World size 1 takes the same path as any other. Not here: how a microbatch is split over a context
axis (:mod:`gspo.parallel.context`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torchtune import utils

from gspo.compat import set_group_timeout
from gspo.errors import NO_VALUE, InputError, first_line, require
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


def init_process_group(device: torch.device, timeout: float | None = None) -> None:
    """Join the processes that torchrun started, or make a group of one without opening a port.

    Args:
        device: this rank's.
        timeout: seconds that a collective waits for the other ranks; None for torch's own.

    Raises:
        InputError: The rendezvous address is in use or cannot be reached.
    """
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        dist.init_process_group(backend, timeout=_as_timedelta(timeout))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            "MASTER_ADDR:MASTER_PORT",
            address,
            f"is where the ranks could not meet: {first_line(error)}",
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
    timeout: float | None = None  # seconds that a collective waits for the other ranks

    @classmethod
    def of(
        cls,
        device: torch.device,
        *,
        replicate: int = 1,
        context: int = 1,
        timeout: float | None = None,
    ) -> Ranks:
        """Make the mesh over all ranks of the process group.

        Args:
            device: this rank's device.
            replicate: replicas of the parameters.
            context: ranks that share a microbatch.
            timeout: see :func:`init_process_group`, which does not set it for parts of the mesh.

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
        shape = {"replicate": replicate, "shard": world_size // product, "context": context}
        return cls(_make_mesh(device.type, shape, timeout), timeout)

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
        shape = {"shard": self.num_shards}
        replicas = self.mesh["replicate"].size()
        if replicas > 1:
            shape = {"replicate": replicas} | shape
        return _make_mesh(self.mesh.device_type, shape, self.timeout)


def _make_mesh(device_type: str, shape: Mapping[str, int], timeout: float | None) -> DeviceMesh:
    """Make a mesh of named axes whose groups all have the timeout."""
    mesh = init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    if timeout is not None:
        for group in mesh.get_all_groups():
            set_group_timeout(group, timedelta(seconds=timeout))
    return mesh


def _as_timedelta(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)


def sum_over_ranks(counts: Sequence[int]) -> list[int]:
    """Return each count, of as many on every rank, summed over all ranks. Collective.

    It is reduced on the CPU, by gloo: a rank may wait here for the slowest sampler, and no stream
    of a GPU waits with it.

    Raises:
        InputError: Another rank did not come in time.
    """
    total = torch.tensor(counts, dtype=torch.int64)
    try:
        dist.all_reduce(total)
    except RuntimeError as error:
        if "timed out" not in str(error).lower():
            raise
        raise InputError(
            "collective_timeout",
            NO_VALUE,
            f"has passed while rank {dist.get_rank()} waited for another rank's microbatch",
            "raise it if a rollout may take longer; else look at what the other rank printed last",
        ) from error
    return total.tolist()
