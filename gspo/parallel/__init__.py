"""Ranks, and how a microbatch is split over those of a context axis."""

from gspo.parallel.context import ContextAxis
from gspo.parallel.cuda import prepare_device
from gspo.parallel.mesh import Ranks, find_device, init_process_group, sum_over_ranks
from gspo.parallel.split import Shard, split

__all__ = [
    "ContextAxis",
    "Ranks",
    "Shard",
    "find_device",
    "init_process_group",
    "prepare_device",
    "split",
    "sum_over_ranks",
]
