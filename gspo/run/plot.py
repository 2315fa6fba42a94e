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


MAX_POINTS = 40  # a series with fewer is drawn as it is, a longer one as dots with a running mean


def plot_run(output: Path) -> Path:
    """Draws ``curves.png`` into the run folder and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for color, name in zip(("tab:blue", "tab:orange"), names, strict=False):
            steps = [r["step"] for r in records if r.get(name) is not None]
            _draw(
                axis,
                steps,
                [r[name] for r in records if r.get(name) is not None],
                label=name,
                color=color,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    path = output / "curves.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw(axis: Any, steps: list[int], values: list[float], *, label: str, color: str) -> None:
    if len(values) <= MAX_POINTS:
        axis.plot(steps, values, color=color, label=label, marker="o", markersize=3)
        return
    width = len(values) // MAX_POINTS
    means = [sum(values[i : i + width]) / width for i in range(len(values) - width + 1)]
    axis.plot(steps, values, ".", color=color, alpha=0.25, markersize=3)
    axis.plot(steps[width // 2 :][: len(means)], means, color=color, label=label)
