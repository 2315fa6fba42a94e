"""Probes of what the design rests on, with torch and the head's operations alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu_first_parts.visit import Visit, cudnn_attention, first_and_steady, peak_memory
from gspo.kernels import head, rows

_COLUMNS_BESIDE = 7  # from one exact length to the next: most are no multiple of anything


def rates(visit: Visit) -> dict[str, Any]:
    """Return what a large product and a copy reach, against which the plan's rates stand."""
    size = visit.sizes.product_size
    left, right = torch.randn(2, size, size, device=visit.device).bfloat16()
    product = first_and_steady(lambda: left @ right, visit.device)
    source = torch.zeros(visit.sizes.copied_bytes, dtype=torch.uint8, device=visit.device)
    target = torch.empty_like(source)
    copy = first_and_steady(lambda: target.copy_(source), visit.device)
    tflops = 2 * size**3 / product["ms"] / 1e9
    gbytes = 2 * source.nbytes / copy["ms"] / 1e6
    return {
        "bf16_tflops": tflops,
        "copy_gbytes_per_s": gbytes,
        "says": f"{tflops:.0f} TFLOP/s in bf16, {gbytes:.0f} GB/s copied (read and written)",
    }


def products(visit: Visit) -> dict[str, Any]:
    """Compare the head's products with float64: operands in bf16, sums and results in float32.

    The errors are the largest of an entry, as a share of the largest entry. A sum that went through
    bf16 on the way would show as 1e-3.
    """
    sizes = visit.sizes
    hidden = _random(visit, sizes.num_rows, sizes.hidden_size)
    weight = _random(visit, sizes.vocab_size, sizes.hidden_size)
    logits = head._new_buffer(hidden, weight, sizes.num_rows)  # with the gap between its rows
    rows.product(hidden, weight, logits)
    errors = {"mm": _error(logits, hidden.double() @ weight.double().T)}
    gradient = logits.to(visit.dtype)
    del logits
    total = torch.full_like(weight, torch.nan, dtype=torch.float32)  # beta 0: is not read
    exact = gradient.double().T @ hidden.double()
    rows.accumulate(gradient, hidden, total, 0.0)
    errors["addmm_first"] = _error(total, exact)
    rows.accumulate(gradient, hidden, total, 1.0)
    errors["addmm_in_place"] = _error(total, 2 * exact)
    d_hidden = torch.empty(sizes.num_rows, sizes.hidden_size, device=visit.device)
    rows.product(gradient, weight.T, d_hidden)
    errors["mm_transposed"] = _error(d_hidden, gradient.double() @ weight.double())
    worst = max(errors.values())
    return {"max_relative_error": errors, "says": f"largest error {worst:.1e} of the largest entry"}


def _random(visit: Visit, *shape: int) -> Tensor:
    generator = torch.Generator(visit.device).manual_seed(sum(shape))
    values = torch.randn(shape, device=visit.device, generator=generator)
    return values.to(visit.dtype)


def _error(values: Tensor, exact: Tensor) -> float:
    difference = (values.double() - exact).abs().max()
    return float(difference / exact.abs().max())


def attention(visit: Visit) -> dict[str, Any]:
    """Time one token's attention over the cache at many lengths, with cuDNN's attention on and off.

    ``exact``: all filled columns and no mask, a new shape each time. ``blocks``: whole blocks of
    columns, the unfilled ones masked.
    """
    sides = {}
    for form in ("exact", "blocks"):
        for is_on in (False, True):
            with cudnn_attention(is_on):
                side = _time_lengths(visit, form)
            name = f"{form}, cuDNN {'on' if is_on else 'off'}"
            sides[name] = side
            visit.note("attention", **{name: side})
    totals = {}
    for name, side in sides.items():
        first = sum(row["first_ms"] for row in side["lengths"])
        steady = sum(row["ms"] for row in side["lengths"])
        totals[name] = {"first_ms": first, "ms": steady}
    says = [
        f"{name}: first calls {total['first_ms']:.1f} ms, then {total['ms']:.2f}"
        for name, total in totals.items()
    ]
    return {"sides": sides, "totals": totals, "says": "; ".join(says)}


def _time_lengths(visit: Visit, form: str) -> dict[str, Any]:
    calls = list(_attention_calls(visit, form))
    timed = []
    for length, call in calls:
        timed.append({"columns": length, **first_and_steady(call, visit.device)})
    _, call = calls[0]
    return {"operations": attention_operations(call), "lengths": timed}


def _attention_calls(visit: Visit, form: str) -> Iterator[tuple[int, Callable[[], Tensor]]]:
    """Yield lengths, and a call at each on a slice of one cache."""
    sizes = visit.sizes
    capacity = sizes.num_lengths * sizes.block_columns
    cache_shape = (sizes.decode_rows, sizes.num_kv_heads, capacity, sizes.head_dim)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": visit.device}
    keys = torch.randn(cache_shape, **options)
    values = torch.randn(cache_shape, **options)
    query_shape = (sizes.decode_rows, sizes.num_kv_heads, sizes.queries_per_kv_head, sizes.head_dim)
    query = torch.randn(query_shape, **options)
    bias = torch.zeros(sizes.decode_rows, 1, 1, capacity, **options)
    bias[..., ::3] = -torch.inf
    for number in range(sizes.num_lengths):
        length = (number + 1) * sizes.block_columns
        mask: Tensor | None = bias[..., :length]
        if form == "exact":
            length = sizes.block_columns + 1 + number * _COLUMNS_BESIDE
            mask = None
        length = min(length, capacity)
        yield length, _attention_call(query, keys[:, :, :length], values[:, :, :length], mask)


def _attention_call(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> Callable[[], Tensor]:
    return lambda: F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def attention_operations(call: Callable[[], Any]) -> dict[str, int]:
    """Return the attention operations that a call ends in, and how often: they name the backend."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    counts = {}
    for event in profiler.key_averages():
        if event.key.startswith("aten::_") and "attention" in event.key:
            counts[event.key] = event.count
    return counts


def measure_call(visit: Visit, call: Callable[[], Any]) -> dict[str, float]:
    """Return the milliseconds and the peak memory of a call."""
    times = first_and_steady(call, visit.device, repeats=3)
    with peak_memory(visit.device) as peak:
        call()
    return times | peak.describe()
