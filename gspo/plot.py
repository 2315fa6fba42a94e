"""The curves of a run, from its ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path

PANELS = {
    "reward": ["reward/mean"],
    "held-out accuracy": ["eval/accuracy"],
    "KL to the sampler, nats per document": ["kl_new_old"],
    "clip fraction, documents": ["clip/any_document", "clip/binding_document"],
    "completion length, tokens": ["length/mean"],
    "entropy, nats per token": ["entropy"],
}


def plot_run(output: Path) -> Path:
    """Draws ``curves.png`` into the run folder and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name in names:
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=name, marker="o" if len(points) < 40 else None, markersize=3
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
