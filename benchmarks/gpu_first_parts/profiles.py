"""Profiles of an update and of decode steps, kernel by kernel, and the blocks of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_first_parts.documents import draw_groups, draw_tokens, pack
from gpu_first_parts.rig import Rig, the_rig
from gpu_first_parts.visit import MIB, Visit, synchronize
from gspo.types import Prompt

_MOST_KERNELS = 20
_MOST_BLOCKS = 12


def update(visit: Visit) -> dict[str, Any]:
    """Profile an optimizer step of a few microbatches, once all is compiled."""
    rig = the_rig(visit)
    microbatches = rig.prepare(pack(rig.cfg, draw_groups(rig.cfg, visit.sizes.short_documents)))
    rig.step(microbatches)
    kernels = _profile(visit, lambda: rig.step(microbatches))
    return kernels | {"microbatches": len(microbatches), "says": _in_words(kernels)}


def decode(visit: Visit) -> dict[str, Any]:
    """Profile decode steps at a short and a long cache, all rows behind one prompt."""
    rig = the_rig(visit)
    num_steps = visit.sizes.profiled_steps
    lengths = {}
    for num_columns in visit.sizes.profiled_columns:
        one = _profile(visit, _decode_call(rig, num_columns, 1))  # the prefill and the first draw
        all_steps = _profile(visit, _decode_call(rig, num_columns, 1 + num_steps))
        launches = (all_steps["launches"] - one["launches"]) / num_steps
        device_ms = (all_steps["device_ms"] - one["device_ms"]) / num_steps
        lengths[str(num_columns)] = all_steps | {
            "launches_per_step": launches,
            "device_ms_per_step": device_ms,
        }
    says = [
        f"{columns} columns: {row['launches_per_step']:.0f} launches and "
        f"{row['device_ms_per_step']:.2f} ms a step"
        for columns, row in lengths.items()
    ]
    return {"steps": num_steps, "columns": lengths, "says": "; ".join(says)}


def _decode_call(rig: Rig, num_columns: int, num_tokens: int) -> Callable[[], Any]:
    prompt_length = num_columns - rig.visit.sizes.profiled_steps
    prompt = Prompt("0", "", draw_tokens(rig.cfg, prompt_length, seed=0))
    rows = rig.cfg.sampler["max_batch_size"]
    return lambda: rig.sample(rig.sampler, [prompt], group_size=rows, new_tokens=num_tokens)


def _profile(visit: Visit, call: Callable[[], Any]) -> dict[str, Any]:
    """Return the launches of a call, the device's milliseconds, and its longest kernels."""
    activities = [ProfilerActivity.CPU]
    if visit.on_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        call()
        synchronize(visit.device)
    rows = _kernel_rows(visit, profiler)
    return {
        "launches": sum(row["calls"] for row in rows),
        "device_ms": sum(row["ms"] for row in rows),
        "kernels": rows[:_MOST_KERNELS],
    }


def _kernel_rows(visit: Visit, profiler: profile) -> list[dict[str, Any]]:
    """Return kernels by time; a CPU's operations stand in for them."""
    rows = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total
        is_kernel = event.device_type == DeviceType.CUDA and not event.is_user_annotation
        if not visit.on_cuda:
            microseconds = event.self_cpu_time_total
            is_kernel = event.key.startswith("aten::")
        if is_kernel:
            rows.append({"name": event.key, "calls": event.count, "ms": microseconds / 1e3})
    return sorted(rows, key=lambda row: -row["ms"])


def _in_words(kernels: dict[str, Any]) -> str:
    first = kernels["kernels"][0]
    return (
        f"{kernels['launches']} launches, {kernels['device_ms']:.0f} ms on the device; longest "
        f"{first['name'][:60]}, {first['ms']:.0f} ms"
    )


def memory(visit: Visit) -> dict[str, Any]:
    """Return what the allocator holds after an update and a draw, and the largest blocks."""
    rig = the_rig(visit)
    microbatches = rig.prepare(pack(rig.cfg, draw_groups(rig.cfg, visit.sizes.short_documents)))
    if not rig.num_steps:
        rig.step(microbatches)
    counts, blocks = _allocator(visit)
    largest = sorted(blocks, reverse=True)[:_MOST_BLOCKS]
    sizes = [round(size / MIB, 1) for size in largest]
    says = ", ".join(f"{name} {value:.0f}" for name, value in counts.items())
    return {"counts": counts, "largest_mib": sizes, "says": f"{says}; largest {sizes[:3]} MiB"}


def _allocator(visit: Visit) -> tuple[dict[str, float], list[int]]:
    """Return figures in MiB and counts, and the bytes of every block; a CPU's tensors stand in."""
    if not visit.on_cuda:
        storages = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
                storages[id(thing)] = thing.numel() * thing.element_size()
        blocks = list(storages.values())
        return {"allocated_mib": sum(blocks) / MIB, "num_blocks": len(blocks)}, blocks
    stats = torch.cuda.memory_stats(visit.device)
    blocks = []
    segments = torch.cuda.memory_snapshot()
    for segment in segments:
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                blocks.append(block["size"])
    counts = {
        "allocated_mib": stats["allocated_bytes.all.current"] / MIB,
        "peak_allocated_mib": stats["allocated_bytes.all.peak"] / MIB,
        "reserved_mib": stats["reserved_bytes.all.current"] / MIB,
        "peak_reserved_mib": stats["reserved_bytes.all.peak"] / MIB,
        "inactive_split_mib": stats["inactive_split_bytes.all.current"] / MIB,
        "num_segments": len(segments),
        "num_blocks": len(blocks),
        "alloc_retries": stats["num_alloc_retries"],
        "ooms": stats["num_ooms"],
    }
    return counts, blocks
