"""The machine and the versions that a benchmark ran on, for its report."""

import datetime
import platform
from pathlib import Path

import torch


def hardware() -> dict[str, str | int]:
    """Return date, processor, threads and versions."""
    models = _processor_models()
    return {
        "date": str(datetime.date.today()),
        "cpu": models[0] if models else platform.processor(),
        "cores": len(models),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor_models() -> list[str]:
    """Return the model name of each core; none where there is no ``/proc``."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return []
    models = []
    for line in path.read_text().splitlines():
        if line.startswith("model name"):
            _, name = line.split(":", 1)
            models.append(name.strip())
    return models
