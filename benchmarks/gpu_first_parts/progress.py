"""The file in which a part's process says what it has begun and what has come of it.

One JSON object a line: ``measurement``, ``state`` and ``at`` (seconds since the epoch), with what
belongs to the state. Lines are only added, so that a process that dies takes nothing along.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

RUNNING = "running"
DONE = "done"
FAILED = "failed"
TIMED_OUT = "timed out"
SKIPPED = "skipped"  # for a reason that is no failure, such as a package that is not there
LEFT_OUT = "left out"  # there was no time for it any more

Record = dict[str, Any]


def append(file: Path, measurement: str, state: str, **values: Any) -> None:
    """Add a line."""
    record = {"measurement": measurement, "state": state, "at": time.time(), **values}
    line = json.dumps(plain(record), allow_nan=False)
    with file.open("a") as lines:
        lines.write(line + "\n")


def read(file: Path) -> dict[str, Record]:
    """Return what is known of each measurement: its last state, and all that it noted before.

    ``seconds`` are those since it began.
    """
    if not file.exists():
        return {}
    *lines, _ = file.read_text().split("\n")  # the last is empty, or not written to its end
    records: dict[str, Record] = {}
    for line in lines:
        record = json.loads(line)
        name = record.pop("measurement")
        before = records.get(name, {})
        began = before.get("began", record["at"])
        seconds = round(record.pop("at") - began, 3)
        partial = {**before.get("partial", {}), **record.pop("partial", {})}
        record |= {"began": began, "seconds": seconds}
        if partial and "result" not in record:
            record["partial"] = partial
        records[name] = record
    return records


def plain(value: Any) -> Any:
    """Return values that JSON holds; numbers that are not finite become text."""
    if isinstance(value, dict):
        return {str(key): plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value
