"""The device of a visit, its clock and memory, and a CPU's stand-ins for what only CUDA has."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_first_parts import progress
from gpu_first_parts.sizes import REAL, TINY, Sizes

MIB = 2**20
_CPU_PEAK = 1e11  # operations a second, a stand-in
# Dense bf16 operations a second, from the data sheets.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


class Skipped(Exception):
    """A measurement that this machine or this version of the pack has nothing for."""


@dataclass(frozen=True)
class Visit:
    """The device that is measured, and how much of it."""

    device: torch.device
    sizes: Sizes
    file: Path  # of the part's progress

    @property
    def on_cuda(self) -> bool:
        """Whether it is no rehearsal."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the head's operands; a CPU has no bf16 product with a float32 output."""
        return torch.bfloat16 if self.on_cuda else torch.float32

    def note(self, name: str, **partial: Any) -> None:
        """Keep what a measurement knows already, in case that it does not come to its end."""
        progress.append(self.file, name, progress.RUNNING, partial=partial)

    def earlier(self, name: str) -> dict[str, Any] | None:
        """Return the result of an earlier measurement of this part; None if it has none."""
        record = progress.read(self.file).get(name, {})
        return record.get("result")


def make_visit(file: Path, *, is_rehearsal: bool) -> Visit:
    """Return the visit to this machine's first GPU, or the rehearsal of one."""
    if is_rehearsal:
        _compile_quickly()
        return Visit(torch.device("cpu"), TINY, file)
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; --rehearse runs on a CPU")
    return Visit(torch.device("cuda", 0), REAL, file)


def _compile_quickly() -> None:
    """Let torch.compile trace as always and generate no code, which takes a CPU a minute."""
    torch.compile = partial(torch.compile, backend="aot_eager")


def synchronize(device: torch.device) -> None:
    """Wait for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the wall time of a call, all that it launches included."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def first_and_steady(
    call: Callable[[], Any], device: torch.device, *, repeats: int = 10
) -> dict[str, float]:
    """Return the milliseconds of the first call, and of one of many calls after it."""

    def calls() -> None:
        for _ in range(repeats):
            call()

    first = seconds(call, device)
    steady = seconds(calls, device) / repeats
    return {"first_ms": 1e3 * first, "ms": 1e3 * steady}


@dataclass
class Peak:
    """The memory at the highest, in MiB, once its ``with`` block is left."""

    before: float = 0.0  # allocated at the beginning
    allocated: float = 0.0
    reserved: float = 0.0

    @property
    def beyond(self) -> float:
        """The allocated memory beyond what was there before."""
        return self.allocated - self.before

    def describe(self) -> dict[str, float]:
        """Return plain values."""
        return {
            "peak_mib": round(self.allocated, 1),
            "peak_beyond_mib": round(self.beyond, 1),
            "peak_reserved_mib": round(self.reserved, 1),
        }


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the most memory in a block: a GPU's allocator, or the resident process."""
    gc.collect()
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        peak.before = torch.cuda.memory_allocated(device) / MIB
        yield peak
        synchronize(device)
        peak.allocated = torch.cuda.max_memory_allocated(device) / MIB
        peak.reserved = torch.cuda.max_memory_reserved(device) / MIB
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    peak.before = _resident_mib("VmRSS")
    yield peak
    peak.allocated = peak.reserved = _resident_mib("VmHWM")


def _resident_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise KeyError(name)


def device_memory(device: torch.device) -> int:
    """Return the bytes of the device's memory; a stand-in for a CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return 2**33


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 operations a second of the data sheet; None for an unknown GPU."""
    if device.type != "cuda":
        return _CPU_PEAK
    name = torch.cuda.get_device_name(device)
    for known, flops in _PEAK_FLOPS.items():
        if known in name:
            return flops
    return None


def allocated_mib(device: torch.device) -> float:
    """Return what is allocated now, or the resident process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    return _resident_mib("VmRSS")


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def cudnn_attention(is_on: bool) -> Iterator[None]:
    """Switch cuDNN's attention; a CPU has none."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(is_on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def reduced_sums(is_reduced: bool) -> Iterator[None]:
    """Switch whether sums of bf16 products that are split may be rounded to bf16 on the way."""
    matmul: Any = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    before = getattr(matmul, name), getattr(matmul, f"{name}_split_k")
    setattr(matmul, name, (is_reduced, is_reduced))
    try:
        yield
    finally:
        setattr(matmul, name, before)
