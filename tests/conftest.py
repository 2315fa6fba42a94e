"""One thread a worker under pytest-xdist, a stand-in for a missing GPU, and the pack as a wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Before anything imports triton, whose kernels then run on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch.distributed as dist  # noqa: E402

from gspo.tiny import make_untrained  # noqa: E402
from tests.recipes import runs  # noqa: E402

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is none, saying so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The pack built as a wheel, from a copy."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("gspo", "recipes", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "_gspo_torch_plugin.py"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", target)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, source], check=True, timeout=300
    )
    return next(target.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A folder as site-packages holds it, its entry point included."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """An untrained model in ``base`` and its questions in ``data``."""
    folder = tmp_path_factory.mktemp("tiny")
    make_untrained(folder / "base", folder / "data", seed=0, num_train=64, num_heldout=8)
    return folder


@pytest.fixture(scope="session")
def recipe():
    """The recipe's module."""
    return runs.load_recipe()


@pytest.fixture
def no_group_left():
    """Ends the process group of a run that stopped early."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def run(recipe, base, tmp_path, monkeypatch, no_group_left):
    """Runs the recipe in this process; gives the exit code and the output folder."""

    def of(*more, config="gspo", **options):
        arguments = runs.overrides(base, tmp_path / "out", *more, **options)
        monkeypatch.setattr(sys, "argv", runs.command_line(*arguments, config=config))
        with pytest.raises(SystemExit) as stopped:
            recipe.recipe_main()
        return stopped.value.code, tmp_path / "out"

    return of
