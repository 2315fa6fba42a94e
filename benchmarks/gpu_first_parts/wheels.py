"""Versions, and the packages that the pack needs and this machine lacks. Nothing is fetched."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gpu_first_parts.visit import Visit

ROOT = Path(__file__).parents[2]
_NAMED = ("torch", "triton", "torchtune", "torchao", "torchdata", "transformers", "numpy", "pytest")
_DRIVER_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def versions(visit: Visit) -> dict[str, Any]:
    """Return versions, and what the device is."""
    packages = {name: _installed(name) for name in _NAMED}
    packages["torch"] = torch.__version__  # says for which CUDA it was built
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": packages,
        "cuda": torch.version.cuda,
        "device": _describe(visit.device),
    }
    device = result["device"]
    result["says"] = f"{device['name']}, torch {packages['torch']}, CUDA {result['cuda']}"
    return result


def _describe(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine(), "driver": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "driver": _driver(),
        "memory_gib": properties.total_memory / 2**30,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),
    }


def _driver() -> str | None:
    """Return the version of the driver; None where nothing tells it."""
    if shutil.which(_DRIVER_QUERY[0]) is None:
        return None
    answer = subprocess.run(_DRIVER_QUERY, capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def packages(visit: Visit) -> dict[str, Any]:
    """Return the packages that are missing or of a version out of range, by what needs them."""
    pins = read_pins()
    wanted = {}
    problems = []
    for group, requirements in _requirements().items():
        wanted[group] = [_compare(requirement, pins) for requirement in requirements]
        for row in wanted[group]:
            if row["problem"]:
                problems.append(f"{row['name']} ({group}): {row['problem']}")
    pinned = [f"{name}=={pin}" for name, pin in pins.items() if _installed(name) is None]
    incomplete = _missing_of_installed(pins)
    return {
        "wanted": wanted,
        "needed_by_installed": incomplete,
        "pinned_and_missing": pinned,
        "says": "; ".join([*problems, *incomplete]) or "nothing is missing",
    }


def read_pins() -> dict[str, str]:
    """Return the versions of ``constraints.txt`` by name."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, is_pin, version = line.partition("==")
        if is_pin:
            pins[_normal(name)] = version
    return pins


def _requirements() -> dict[str, list[str]]:
    """Return the requirements of ``pyproject.toml``: at runtime, and those of each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"runtime": project["dependencies"], **project["optional-dependencies"]}


def _compare(text: str, pins: dict[str, str]) -> dict[str, Any]:
    """Compare a requirement with what is installed."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    name = _normal(requirement.name)
    installed = _installed(name)
    pin = pins.get(name)
    problem = None
    if requirement.marker is not None and not requirement.marker.evaluate():
        pass
    elif installed is None:
        problem = f"missing, pinned {pin}" if pin else "missing"
    elif not requirement.specifier.contains(installed, prereleases=True):
        problem = f"{installed} is not {requirement.specifier}, pinned {pin}"
    return {"name": name, "installed": installed, "pinned": pin, "problem": problem}


def _missing_of_installed(pins: dict[str, str]) -> list[str]:
    """Return what the pinned packages that are here need and lack: wheels come one by one."""
    from packaging.requirements import Requirement

    lacking = []
    for name in pins:
        if _installed(name) is None:
            continue
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and _installed(requirement.name) is None:
                pin = pins.get(_normal(requirement.name))
                lacking.append(f"{requirement.name} (for {name}): missing, pinned {pin}")
    return lacking


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
