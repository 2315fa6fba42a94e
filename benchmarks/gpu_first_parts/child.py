"""The process of one part: it runs the measurements that it is told, one after another.

The first that fails ends it. Whoever started it begins another for the rest, with a context and a
memory of its own: after an illegal access nothing else would run in this one.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import torch

from gpu_first_parts import progress
from gpu_first_parts.parts import Measurement, find_part
from gpu_first_parts.visit import Skipped, Visit, make_visit
from gpu_first_parts.wheels import read_pins

_TAIL = 25  # lines of an error that are kept
_OWN = ("gspo", "gpu_first_parts", "tests", "loss_kernel")  # modules whose absence is a mistake


def run_child(
    part_name: str, names: list[str], *, file: Path, deadline: float, is_rehearsal: bool
) -> None:
    """Run measurements of a part, and write what comes of them.

    Args:
        part_name: The part.
        names: Of the measurements.
        file: For :mod:`gpu_first_parts.progress`.
        deadline: Seconds since the epoch; what would not be done by then is left out.
        is_rehearsal: On the CPU, with small sizes.
    """
    part = find_part(part_name)
    visit = make_visit(file, is_rehearsal=is_rehearsal)
    flags = _prepare(visit.device) if part.prepares else "torch's own"
    for name in names:
        measurement = part.measurement(name)
        seconds = measurement.seconds(is_rehearsal=is_rehearsal)
        if time.time() + seconds > deadline:
            progress.append(file, name, progress.LEFT_OUT, reason=f"it takes about {seconds:.0f} s")
            continue
        progress.append(file, name, progress.RUNNING)
        _run(measurement, visit, file, flags)
    _leave(0)


def _prepare(device: torch.device) -> str:
    """Set the flags that a run starts with; return whose are set."""
    try:
        from gspo import parallel
    except ModuleNotFoundError as error:
        print(f"torch's own flags stay: {error}", file=sys.stderr)
        return f"torch's own: {error}"
    parallel.prepare_device(device)
    return "the pack's"


def _run(measurement: Measurement, visit: Visit, file: Path, flags: str) -> None:
    name = measurement.name
    try:
        module = importlib.import_module(f"gpu_first_parts.{measurement.module}")
        function = getattr(module, name)
        result = function(visit)
    except Skipped as skipped:
        progress.append(file, name, progress.SKIPPED, reason=str(skipped))
    except ModuleNotFoundError as error:
        if _is_own(error):
            _fail(file, name)
        progress.append(file, name, progress.SKIPPED, reason=_missing(error))
    except BaseException:
        _fail(file, name)
    else:
        progress.append(file, name, progress.DONE, flags=flags, result=result)


def _is_own(error: ModuleNotFoundError) -> bool:
    package, *_ = str(error.name).split(".")
    return package.startswith(_OWN)


def _missing(error: ModuleNotFoundError) -> str:
    """Return which package is missing, with its version where the module has the same name."""
    package, *_ = str(error.name).split(".")
    pin = read_pins().get(package.lower().replace("_", "-"))
    pinned = f"; pinned: {package}=={pin}" if pin else ""
    return f"{error}{pinned}"


def _fail(file: Path, name: str) -> None:
    """Write the error at hand and end the process."""
    text = traceback.format_exc()
    print(text, file=sys.stderr)
    lines = text.splitlines()
    progress.append(file, name, progress.FAILED, error=lines[-_TAIL:])
    _leave(1)


def _leave(code: int) -> NoReturn:
    """End the process without taking anything down, which can hang after an error of a GPU."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
