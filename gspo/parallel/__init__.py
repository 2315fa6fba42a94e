"""Ranks, and how a microbatch is split over them."""

from gspo.parallel.mesh import (
    build_mesh,
    data_parallel_rank,
    find_device,
    fsdp_mesh,
    init_process_group,
    sum_over_ranks,
)

__all__ = [
    "build_mesh",
    "data_parallel_rank",
    "find_device",
    "fsdp_mesh",
    "init_process_group",
    "sum_over_ranks",
]
