"""The first minutes on a GPU: what no CPU could tell, measured by one command.

    python benchmarks/gpu_first.py --json OUT.json [--only PART ...] [--minutes N]
    python benchmarks/gpu_first.py --json OUT.json --rehearse

Parts run in their order (``gpu_first_parts/parts.py``), each in a process of its own, and every
measurement of a part has its own time limit. One that fails, crashes or hangs costs itself alone:
its part goes on in another process. What has been measured is in OUT at once, and a part that an
earlier call left there stays until it is measured again. What no longer fits into ``--minutes`` is
listed as left out; what needs a package that is not here is skipped, with the package's pinned
version. Nothing is fetched.

``--rehearse`` runs all of it on the CPU with tiny sizes. It shows that the code runs, and its
numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_first_parts import progress
from gpu_first_parts.parts import PARTS, Part
from gpu_first_parts.progress import Record

ROOT = Path(__file__).parents[1]
MINUTES = 9.0  # in all, unless the command line says otherwise
_START_LIMIT = 120.0  # seconds until a process has begun its first measurement
_POLL = 0.1  # seconds
_OVER = "the minutes are over"
_TAIL = 25  # lines that a dead process printed last
_BAD = (progress.FAILED, progress.TIMED_OUT)


@dataclass
class Report:
    """The file of results, written anew whenever something has changed."""

    file: Path
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path, *, is_rehearsal: bool) -> Report:
        """Start a report, with the parts that are in the file already."""
        parts = {}
        if file.exists():
            earlier = json.loads(file.read_text())
            if earlier["rehearsal"] == is_rehearsal:
                parts = earlier["parts"]
        return cls(file, {"rehearsal": is_rehearsal, "parts": parts})

    def put(self, part: str, records: dict[str, Record], *, began: float) -> None:
        """Write what is known of a part."""
        self.values["parts"][part] = {
            "state": _state_of(records),
            "began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)),
            "seconds": round(time.time() - began, 1),
            "measurements": records,
        }
        self._write()

    def leave_out(self, part: str) -> None:
        """Write that there was no time for a part, unless an earlier call has measured it."""
        state = {"state": progress.LEFT_OUT, "seconds": 0.0, "measurements": {}}
        self.values["parts"].setdefault(part, state)
        self._write()

    def _write(self) -> None:
        """Replace the file by a whole one: a reader, or a sudden end, never meets half of it."""
        beside = self.file.with_name(self.file.name + ".part")
        beside.write_text(json.dumps(self.values, indent=1) + "\n")
        os.replace(beside, self.file)


def _state_of(records: dict[str, Record]) -> str:
    """Return the worst state of a part's measurements; done if one is and none is worse."""
    states = {record["state"] for record in records.values()}
    for state in (progress.RUNNING, *_BAD, progress.LEFT_OUT, progress.DONE):
        if state in states:
            return state
    return progress.SKIPPED


class PartRun:
    """A part's measurements, in as many processes as it takes.

    Args:
        part: The part.
        report: For what is known of it.
        folder: For files in between.
        deadline: Seconds since the epoch.
        is_rehearsal: On the CPU, with small sizes.
    """

    def __init__(
        self, part: Part, report: Report, folder: Path, *, deadline: float, is_rehearsal: bool
    ) -> None:
        self.part = part
        self.report = report
        self.deadline = deadline
        self.is_rehearsal = is_rehearsal
        self.progress = folder / f"{part.name}.jsonl"
        self.log = folder / f"{part.name}.log"
        self.began = time.time()

    def run(self) -> dict[str, Record]:
        """Run all measurements and return their records."""
        while pending := self._pending():
            if time.time() < self.deadline:
                self._run_process(pending)
                continue
            for name in pending:
                progress.append(self.progress, name, progress.LEFT_OUT, reason=_OVER)
        records = self._records()
        self.report.put(self.part.name, records, began=self.began)
        return records

    def _records(self) -> dict[str, Record]:
        return progress.read(self.progress)

    def _pending(self) -> list[str]:
        records = self._records()
        return [name for name in self.part.names if name not in records]

    def _run_process(self, names: list[str]) -> None:
        """Run one process until it ends or must be ended; then something has a record more."""
        started = time.time()
        with self.log.open("w") as log:
            process = subprocess.Popen(
                self._command(names),
                stdout=log,
                stderr=log,
                env=self._environment(),
                process_group=0,  # so that what it starts ends with it
            )
        try:
            problem = self._wait(process, started)
        finally:
            _end(process)
        self._record_end(process, names, problem)

    def _wait(self, process: subprocess.Popen[bytes], started: float) -> str | None:
        """Return why the process must be ended, or None once it has ended by itself."""
        known: dict[str, Record] = {}
        while process.poll() is None:
            time.sleep(_POLL)
            records = self._records()
            if records != known:
                known = records
                self.report.put(self.part.name, records, began=self.began)
            problem = self._overdue(records, started)
            if problem is not None:
                return problem
        return None

    def _overdue(self, records: dict[str, Record], started: float) -> str | None:
        now = time.time()
        running = _running(records)
        if now > self.deadline:
            return _OVER
        if running is None:
            ends = [record["began"] + record["seconds"] for record in records.values()]
            return "it does not begin" if now - max([started, *ends]) > _START_LIMIT else None
        limit = self.part.measurement(running).limit(is_rehearsal=self.is_rehearsal)
        seconds = now - records[running]["began"]
        return f"it took more than {limit:.0f} s" if seconds > limit else None

    def _record_end(
        self, process: subprocess.Popen[bytes], names: list[str], problem: str | None
    ) -> None:
        """Record what a process that was ended, or died, did not record itself."""
        records = self._records()
        running = _running(records)
        begun = [name for name in names if name in records]
        if running is None and begun and problem is None:
            return
        tail = self.log.read_text(errors="replace").splitlines()[-_TAIL:]
        state, reason = progress.TIMED_OUT, problem
        if problem is None:
            state, reason = progress.FAILED, f"the process ended with {process.returncode}"
        unfinished = [running] if running else [name for name in names if name not in records]
        for name in unfinished:
            progress.append(self.progress, name, state, reason=reason, error=tail)

    def _command(self, names: list[str]) -> list[str]:
        options = ["--child", self.part.name, "--measurements", *names]
        options += ["--json", str(self.progress), "--deadline", str(self.deadline)]
        if self.is_rehearsal:
            options.append("--rehearse")
        return [sys.executable, str(Path(__file__).resolve()), *options]

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT)]
        if "PYTHONPATH" in os.environ:
            paths.append(os.environ["PYTHONPATH"])
        added = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        if self.is_rehearsal:
            # Triton's kernels run on the CPU, and layers are compiled to nothing. On tensors this
            # small a second thread costs more than it does.
            added |= {"TRITON_INTERPRET": "1", "TORCH_COMPILE_BACKEND": "aot_eager"}
            added |= {"OMP_NUM_THREADS": "1"}
        return os.environ | added


def _running(records: dict[str, Record]) -> str | None:
    for name, record in records.items():
        if record["state"] == progress.RUNNING:
            return name
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended
    process.wait()


def show(part: Part, records: dict[str, Record]) -> None:
    """Print a line on a part, and one on each of its measurements."""
    print(f"{part.name}: {_state_of(records)}", flush=True)
    for name, record in records.items():
        seconds = record.get("seconds", 0.0)
        print(f"  {name:16s} {record['state']:10s} {seconds:7.1f} s  {_in_words(record)}")
    sys.stdout.flush()


def _in_words(record: Record) -> str:
    """Return what a measurement says, or the last line of what went wrong."""
    if "result" in record:
        return record["result"]["says"]
    words = [record["reason"]] if "reason" in record else []
    words += record.get("error", [])[-1:]
    return ": ".join(words)


def run(args: argparse.Namespace) -> int:
    """Run the wanted parts and return how many are neither done nor skipped."""
    report = Report.open(args.json, is_rehearsal=args.rehearse)
    deadline = time.time() + 60 * args.minutes
    num_bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            if args.only and part.name not in args.only:
                continue
            shortest = min(
                measurement.seconds(is_rehearsal=args.rehearse) for measurement in part.measurements
            )
            if time.time() + shortest > deadline:
                report.leave_out(part.name)
                print(f"{part.name}: {progress.LEFT_OUT}, the minutes are over", flush=True)
                num_bad += 1
                continue
            part_run = PartRun(
                part, report, Path(folder), deadline=deadline, is_rehearsal=args.rehearse
            )
            records = part_run.run()
            show(part, records)
            num_bad += _state_of(records) not in (progress.DONE, progress.SKIPPED)
    print(f"wrote {args.json}")
    return num_bad


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--json", type=Path, required=True, metavar="OUT", help="write the results here")
    add("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    add("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts")
    add("--minutes", type=float, default=MINUTES, help="in all; default %(default)g")
    add("--child", help=argparse.SUPPRESS)
    add("--measurements", nargs="+", help=argparse.SUPPRESS)
    add("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the parts; in a part's own process, its measurements."""
    args = parse_arguments()
    if args.child is None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a part's process ends with it
        sys.exit(run(args) > 0)
    from gpu_first_parts.child import run_child  # imports torch

    run_child(
        args.child,
        args.measurements,
        file=args.json,
        deadline=args.deadline,
        is_rehearsal=args.rehearse,
    )


if __name__ == "__main__":
    main()
