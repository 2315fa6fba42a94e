"""The curves of a run, from its ``metrics.jsonl``: ``python -m gspo.run.plot RUN_FOLDER``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gspo.config import refusals, show_errors
from gspo.errors import DataError, require

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


@show_errors
def main(arguments: list[str] | None = None) -> None:
    """Draw the curves of the run whose folder the command line names.

    Args:
        arguments: None takes those of the process.

    Raises:
        InputError: There is no such run, or matplotlib is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m gspo.run.plot", description="Draw curves.png into the folder of a run."
    )
    parser.add_argument("folder", metavar="RUN_FOLDER", help="with the run's metrics.jsonl")
    folder = Path(parser.parse_args(arguments).folder)
    has_metrics = (folder / "metrics.jsonl").is_file()
    require(
        has_metrics, "RUN_FOLDER", str(folder), "has no metrics.jsonl", "name a run's output_dir"
    )
    with refusals("RUN_FOLDER", "choose a folder that can be written"):
        path = plot_run(folder)
    print(f"wrote {path}")


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
    for number, line in enumerate(text.splitlines(), start=1):
        records.append(_parse(line, f"{path}:{number}"))
    return records


def _parse(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(place, must=f"not JSON: {error}", remedy="take the line out") from error
    is_row = isinstance(record, dict) and "step" in record
    if not is_row:
        raise DataError(place, line, "is no row of a step", "take the line out")
    return record


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


if __name__ == "__main__":
    main()
