"""Metric sums and shared counts, on the ranks of this process group."""

import os
import time

import torch
import torch.distributed as dist

from gspo import parallel
from gspo.errors import InputError
from gspo.metrics import Max, Mean, Min, StepMetrics, Sum, Time

CPU = torch.device("cpu")

# What four microbatches report; a mean without weight comes from one that had nothing to count.
REPORTS = [
    {
        "loss": Sum(0.5),
        "ratio/mean": Mean(3.0, 3),
        "ratio/max": Max(1.5),
        "ratio/min": Min(0.5),
        "tokens": Sum(10),
    },
    {
        "loss": Sum(0.25),
        "ratio/mean": Mean(0.0, 0),
        "ratio/max": Max(-float("inf")),
        "tokens": Sum(0),
        "reward/a": Mean(2.0, 4),
    },
    {
        "ratio/mean": Mean(1.0, 1),
        "ratio/max": Max(2.5),
        "ratio/min": Min(0.25),
        "time/sample": Time(2.0),
    },
    {"loss": Sum(-1.0), "tokens": Sum(7), "reward/a": Mean(1.0, 1), "time/sample": Time(3.0)},
]


def reduce_reports():
    """Every report added on one rank or another, some as tensors."""
    sums = StepMetrics()
    for i, report in enumerate(REPORTS):
        if i % dist.get_world_size() == dist.get_rank():
            as_tensors = {
                name: type(part)(torch.tensor(part.value), torch.tensor(part.weight))
                for name, part in report.items()
            }
            sums.add(as_tensors if i % 2 else report)
    return sums.reduce()


def meshes():
    """Returns two mesh shapes and this rank's data place for each replicate size, or the error.

    The shapes are those of the whole mesh and of the FSDP mesh.
    """
    found = {}
    for replicate in (1, 2, 3):
        try:
            ranks = parallel.Ranks.of(CPU, replicate=replicate)
        except InputError as error:
            found[replicate] = str(error)
        else:
            place = ranks.data_rank, ranks.num_data_ranks
            found[replicate] = (tuple(ranks.mesh.shape), tuple(ranks.fsdp_mesh.shape), place)
    return found


def timeouts(seconds):
    """The seconds that the groups of both meshes wait, by the axis."""
    ranks = parallel.Ranks.of(CPU, replicate=2, timeout=seconds)
    found = {}
    for mesh in (ranks.mesh, ranks.fsdp_mesh):
        for axis, group in zip(mesh.mesh_dim_names, mesh.get_all_groups(), strict=True):
            found[axis] = group._get_backend(CPU).options._timeout.total_seconds()
    return found


def wait_in_vain():
    """What the first rank is told when the others come 3 seconds late, 1 being allowed."""
    parallel.Ranks.of(CPU, timeout=1.0)
    if dist.get_rank() > 0:
        time.sleep(3)
        return ""
    try:
        parallel.sum_over_ranks([1])
    except InputError as error:
        return str(error)
    return "no error"


def everything():
    """All of this module in one process group."""
    rank = dist.get_rank()
    return {
        "metrics": reduce_reports(),
        "meshes": meshes(),
        "sum": parallel.sum_over_ranks([1, rank, 2**40]),
        "world": int(os.environ["WORLD_SIZE"]),
    }
