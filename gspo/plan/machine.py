"""The machine that a plan is for: memory and rates of a rank."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
RESERVE = 2 * GIB  # of a GPU: its context and NCCL's buffers


@dataclass(frozen=True, slots=True)
class Machine:
    """The memory of a rank and the rates it reaches; a link is counted in one direction."""

    memory: int  # bytes
    tflops: float  # 1e12 operations a second that products of matrices reach
    link_gbps: float  # 1e9 bits a second, inside a node
    node_link_gbps: float  # and between nodes
    memory_gbytes: float  # 1e9 bytes a second, of the device's memory
    launch_us: float  # 1e-6 seconds from one launch of a kernel to the next
    ranks_per_node: int


# Assumed to be reached: about half of an H100's, or of two CPU cores'.
DEFAULT_RATES: dict[str, dict[str, float]] = {
    "cuda": {
        "tflops": 400.0,
        "link_gbps": 2400.0,
        "node_link_gbps": 320.0,
        "memory_gbytes": 2000.0,
        "launch_us": 5.0,
    },
    "cpu": {
        "tflops": 0.1,
        "link_gbps": 40.0,
        "node_link_gbps": 8.0,
        "memory_gbytes": 10.0,
        "launch_us": 0.0,
    },
}
