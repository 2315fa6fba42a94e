"""Metric sums and shared counts, on the ranks of this process group."""

import os

import torch
import torch.distributed as dist

from gspo import parallel
from gspo.errors import InputError
from gspo.metrics import StepMetrics

CPU = torch.device("cpu")

# What four microbatches report; a mean without weight comes from one that had nothing to count.
REPORTS = [
    {
        "loss": (0.5, 1),
        "ratio/mean": (3.0, 3),
        "ratio/max": (1.5, 1),
        "ratio/min": (0.5, 1),
        "tokens": (10, 1),
    },
    {
        "loss": (0.25, 1),
        "ratio/mean": (0.0, 0),
        "ratio/max": (-float("inf"), 1),
        "tokens": (0, 1),
        "reward/a": (2.0, 4),
    },
    {
        "ratio/mean": (1.0, 1),
        "ratio/max": (2.5, 1),
        "ratio/min": (0.25, 1),
        "time/sample": (2.0, 1),
    },
    {"loss": (-1.0, 1), "tokens": (7, 1), "reward/a": (1.0, 1), "time/sample": (3.0, 1)},
]


def reduce_reports():
    """Every report added on one rank or another, some as tensors."""
    sums = StepMetrics(["a"])
    for i, report in enumerate(REPORTS):
        if i % dist.get_world_size() == dist.get_rank():
            as_tensors = {name: tuple(map(torch.tensor, pair)) for name, pair in report.items()}
            sums.add(as_tensors if i % 2 else report)
    return sums.reduce(CPU)


def meshes():
    """For each replicate size, the mesh's shape, the FSDP mesh's, this rank's data place, or the error."""
    found = {}
    for replicate in (1, 2, 3):
        try:
            mesh = parallel.build_mesh(CPU, data_parallel_replicate_size=replicate)
        except InputError as error:
            found[replicate] = str(error)
        else:
            place = parallel.data_parallel_rank(mesh)
            found[replicate] = (tuple(mesh.shape), tuple(parallel.fsdp_mesh(mesh).shape), place)
    return found


def everything():
    """All of this module in one process group."""
    rank = dist.get_rank()
    return {
        "metrics": reduce_reports(),
        "meshes": meshes(),
        "sum": parallel.sum_over_ranks([1, rank, 2**40], CPU),
        "world": int(os.environ["WORLD_SIZE"]),
    }
