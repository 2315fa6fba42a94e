"""The record of what torch.compile has compiled, and why again."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch._dynamo import utils

_MOST = 2000  # compilations that are remembered
_MOST_REASONS = 12
FLEX = "flex_attention"


def forget() -> None:
    """Start to count anew."""
    utils.set_compilation_metrics_limit(_MOST)
    utils.clear_compilation_metrics()
    utils.counters.clear()


def describe() -> dict[str, Any]:
    """Return the compilations by function, their seconds, and the reasons for those again."""
    by_function: Counter[str] = Counter()
    seconds = 0.0
    reasons = []
    failures = []
    for metrics in utils.get_compilation_metrics():
        by_function[str(metrics.co_name)] += 1
        seconds += (metrics.duration_us or 0) / 1e6
        if metrics.recompile_reason:
            reasons.append(f"{metrics.co_name}: {metrics.recompile_reason}"[:300])
        if metrics.fail_type:
            failures.append(f"{metrics.co_name}: {metrics.fail_type}: {metrics.fail_reason}"[:300])
    return {
        "by_function": dict(by_function),
        "flex_attention": by_function[FLEX],
        "seconds": seconds,
        "recompile_reasons": reasons[:_MOST_REASONS],
        "failures": failures,
        "graph_breaks": sum(utils.counters["graph_break"].values()),
    }
