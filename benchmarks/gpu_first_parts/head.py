"""The loss head beside its rivals: ``loss_kernel.py`` at the first two shapes, a file for each."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_first_parts.visit import Visit
from gpu_first_parts.wheels import ROOT


def first_shape(visit: Visit) -> dict[str, Any]:
    """Measure the head of a 1.5B model."""
    return _measure(visit, 0)


def second_shape(visit: Visit) -> dict[str, Any]:
    """Measure the head of a 7B model."""
    return _measure(visit, 1)


def _measure(visit: Visit, number: int) -> dict[str, Any]:
    shape = [str(size) for size in visit.sizes.head_shapes[number]]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        options = ["--device", visit.device.type, "--rounds", str(visit.sizes.head_rounds)]
        options += ["--shape", *shape, "--json", str(file)]
        if visit.sizes.head_providers:
            options += ["--only", *visit.sizes.head_providers]
        command = [sys.executable, str(ROOT / "benchmarks" / "loss_kernel.py"), *options]
        subprocess.run(command, stdout=sys.stderr, check=True)
        report = json.loads(file.read_text())
    says = [_in_words(row) for row in report["rows"] if (row["m"], row["f"]) == (0, 0)]
    says += [f"{name} left out" for name in report["left_out"]]
    return {"report": report, "says": "; ".join(says)}


def _in_words(row: dict[str, Any]) -> str:
    return f"{row['provider']} {row['ms_median']:.1f} ms, {row['peak_mib']:.0f} MiB"
