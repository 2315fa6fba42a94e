"""The curves of a run, from its ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PANELS = {
    "reward": ["reward/mean"],
    "held-out accuracy": ["eval/accuracy"],
    "KL to the sampler, nats per document": ["kl_new_old"],
    "clip fraction, documents": ["clip/any_document", "clip/binding_document"],
    "completion length, tokens": ["length/mean"],
    "entropy, nats per token": ["entropy"],
}
COLORS = ("tab:blue", "tab:orange")
MAX_POINTS = 40  # a series with fewer is drawn as it is, a longer one as dots with a running mean


def plot_run(output: Path) -> Path:
    """Draw ``curves.png`` into the run folder and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = _read_records(output)
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        _draw_panel(axis, records, title, names)
    path = output / "curves.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _read_records(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    text = path.read_text()
    records = []
    for line in text.splitlines():
        record = json.loads(line)
        records.append(record)
    return records


def _draw_panel(axis: Any, records: list[dict[str, Any]], title: str, names: list[str]) -> None:
    for color, name in zip(COLORS, names, strict=False):
        steps = []
        values = []
        for record in records:
            value = record.get(name)
            if value is not None:
                steps.append(record["step"])
                values.append(value)
        _draw(axis, steps, values, label=name, color=color)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.3)
    if len(names) > 1:
        axis.legend(fontsize=8)


def _draw(axis: Any, steps: list[int], values: list[float], *, label: str, color: str) -> None:
    num_points = len(values)
    if num_points <= MAX_POINTS:
        axis.plot(steps, values, color=color, label=label, marker="o", markersize=3)
        return
    width = num_points // MAX_POINTS
    means = _running_means(values, width)
    first = width // 2
    stop = first + len(means)
    centers = steps[first:stop]
    axis.plot(steps, values, ".", color=color, alpha=0.25, markersize=3)
    axis.plot(centers, means, color=color, label=label)


def _running_means(values: list[float], width: int) -> list[float]:
    means = []
    num_windows = len(values) - width + 1
    for start in range(num_windows):
        stop = start + width
        window = values[start:stop]
        mean = sum(window) / width
        means.append(mean)
    return means
