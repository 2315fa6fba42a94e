"""The command for the first minutes on a GPU, rehearsed on a CPU, and what it survives."""

import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"

# What a CPU has nothing for.
REASONS = {("real_shape", "cuda_graphs"): "CUDA graphs need a CUDA device"}

# Stands in for a part's process: each measurement does what its name says.
CHILD = """
import os, sys, time
from pathlib import Path
from gpu_first_parts import progress

file, *names = sys.argv[1:]
file = Path(file)
for name in names:
    progress.append(file, name, progress.RUNNING)
    progress.append(file, name, progress.RUNNING, partial={"half": 0.5})
    if name == "crash":
        print("about to die", flush=True)
        os.abort()
    if name == "hang":
        time.sleep(60)
    progress.append(file, name, progress.DONE, result={"says": "fine", "value": float("nan")})
"""


@pytest.fixture
def gpu_first(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_first")


@pytest.fixture
def run_part(gpu_first, monkeypatch, tmp_path):
    """Runs a part of stand-ins and gives the report's part."""
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    parts = importlib.import_module("gpu_first_parts.parts")
    monkeypatch.setattr(parts, "SHORTEST_LIMIT", 1.0)

    def command(self, names):
        return [sys.executable, "-c", self.child, str(self.progress), *names]

    monkeypatch.setattr(gpu_first.PartRun, "_command", command)

    def of(*names, child=CHILD, seconds=60.0):
        monkeypatch.setattr(gpu_first.PartRun, "child", child, raising=False)
        measurements = [parts.Measurement(name, "none", 0.1) for name in names]
        report = gpu_first.Report.open(tmp_path / "out.json", is_rehearsal=False)
        gpu_first.PartRun(
            parts.Part("some", tuple(measurements)),
            report,
            tmp_path,
            deadline=time.time() + seconds,
            is_rehearsal=False,
        ).run()
        return json.loads((tmp_path / "out.json").read_text())["parts"]["some"]

    return of


def numbers(value):
    """Yield all numbers among plain values; text that stands for one that is not finite too."""
    if isinstance(value, dict):
        for element in value.values():
            yield from numbers(element)
    elif isinstance(value, list):
        for element in value:
            yield from numbers(element)
    elif isinstance(value, float) or value in ("nan", "inf", "-inf"):
        yield float(value)


def test_a_rehearsal_comes_to_the_end_of_every_part(gpu_first, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, BENCHMARKS / "gpu_first.py", "--rehearse", "--json", out]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    report = json.loads(out.read_text())
    parts = {part.name: part.names for part in gpu_first.PARTS}
    assert list(report["parts"]) == list(parts)
    for name, part in report["parts"].items():
        assert list(part["measurements"]) == parts[name]
        for measurement, record in part["measurements"].items():
            if (name, measurement) in REASONS:
                assert record["state"] == "skipped"
                assert record["reason"] == REASONS[name, measurement]
                continue
            assert record["state"] == "done", record
            assert record["seconds"] > 0
            assert record["result"]["says"]
            assert all(math.isfinite(number) for number in numbers(record["result"])), record
    assert finished.returncode == 0, finished.stdout
    real_shape = report["parts"]["real_shape"]["measurements"]
    assert real_shape["steps"]["result"]["finite"]
    assert real_shape["split_sums"]["result"]["sums"]["in float32"]["max"] < 1e-4
    for name in ("rollout", "update_compiled", "update_eager"):
        result = real_shape[name]["result"]
        assert result["tokens_per_s"] > 0 and result["peak_mib"] > 0
        assert result["measured_to_planned"].keys() == {"memory", "seconds"}
    assert real_shape["update_compiled"]["result"]["compiled"]["by_function"]
    assert report["parts"]["probes"]["measurements"]["block_masks"]["result"]["is_same"]
    tests = report["parts"]["tests"]["measurements"]
    assert tests["suite"]["result"]["counts"]["tests"] > 0
    assert set(tests["gradient_bits"]["result"]["differing"].values()) == {0}


def test_a_measurement_that_crashes_or_hangs_costs_itself_alone(run_part):
    part = run_part("first", "crash", "middle", "hang", "last")
    records = part["measurements"]
    states = {name: record["state"] for name, record in records.items()}
    assert states == {
        "first": "done",
        "crash": "failed",
        "middle": "done",
        "hang": "timed out",
        "last": "done",
    }
    assert part["state"] == "failed"
    assert "ended with -6" in records["crash"]["reason"]
    assert "about to die" in records["crash"]["error"]
    assert records["hang"]["reason"] == "it took more than 1 s"
    assert records["hang"]["partial"] == {"half": 0.5}
    assert records["last"]["result"] == {"says": "fine", "value": "nan"}


def test_a_process_that_cannot_begin_fails_all_its_measurements(run_part):
    part = run_part("first", "last", child="raise SystemExit('no device')")
    for record in part["measurements"].values():
        assert record["state"] == "failed"
        assert record["error"] == ["no device"]


def test_what_no_longer_fits_is_left_out(run_part):
    part = run_part("first", "last", seconds=-1.0)
    assert part["state"] == "left out"
    for record in part["measurements"].values():
        assert record["state"] == "left out"


def test_parts_of_an_earlier_call_stay_in_the_file(gpu_first, tmp_path):
    file = tmp_path / "out.json"
    report = gpu_first.Report.open(file, is_rehearsal=False)
    record = {"state": "done", "began": 0.0, "seconds": 1.0, "result": {"says": "fine"}}
    report.put("probes", {"products": record}, began=0.0)
    later = gpu_first.Report.open(file, is_rehearsal=False)
    later.leave_out("probes")
    later.leave_out("tests")
    parts = json.loads(file.read_text())["parts"]
    assert parts["probes"]["state"] == "done" and parts["tests"]["state"] == "left out"
    assert gpu_first.Report.open(file, is_rehearsal=True).values["parts"] == {}


@pytest.mark.parametrize(
    ("module", "state"), [("tiktoken", "skipped"), ("gspo.none", "failed")], ids=str
)
def test_a_missing_package_is_a_reason_and_a_missing_module_of_ours_a_failure(
    gpu_first, tmp_path, module, state
):
    """The child's verdict on an import, without the other parts of a process."""
    script = f"""
import sys
from pathlib import Path
from gpu_first_parts import child, wheels
from gpu_first_parts.parts import Measurement
def missing(visit):
    raise ModuleNotFoundError("No module named {module!r}", name={module!r})
wheels.missing = missing
child._run(Measurement("missing", "wheels", 1.0), None, Path(sys.argv[1]), "")
"""
    file = tmp_path / "progress.jsonl"
    path = {"PYTHONPATH": f"{ROOT}:{BENCHMARKS}"}
    subprocess.run([sys.executable, "-c", script, file], env=path, stderr=subprocess.DEVNULL)
    progress = importlib.import_module("gpu_first_parts.progress")
    record = progress.read(file)["missing"]
    assert record["state"] == state
    if state == "skipped":
        assert "pinned: tiktoken==" in record["reason"]
