"""What every test needs: one thread per worker under pytest-xdist, and a reason where a GPU is missing."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and inherited by the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is none, saying so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
