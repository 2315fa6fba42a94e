"""The choice of the loss head's backend, and of how many rows of logits it holds at a time."""

from __future__ import annotations

import logging
import os
import shutil
from functools import cache

from gspo.errors import require

KERNELS = ("auto", "triton", "compile", "reference")
_SMALL_VOCABULARY = 4096  # below, a chunk of plain torch takes no time that is worth a compilation
# Bytes of a chunk's logits: products of fewer rows are slower, of 300 by a tenth.
_CPU_BUFFER = 96 * 2**20
_GPU_ROWS = 4096  # enough to fill a product with any vocabulary

logger = logging.getLogger(__name__)


@cache
def choose_kernel(kernel: str, device_type: str, vocab_size: int) -> str:
    """Return the backend that ``kernel`` means for this device and vocabulary.

    What ``auto`` chooses is logged once.

    Raises:
        InputError: A name that is not known, or a backend that cannot run here.
    """
    names = ", ".join(KERNELS)
    is_known = kernel in KERNELS
    require(is_known, "kernel", kernel, f"must be one of {names}")
    if kernel == "auto":
        return _choose_for_device(device_type, vocab_size)
    if kernel == "triton":
        is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        can_run = device_type == "cuda" or is_interpreted
        must = f"needs a CUDA device, not {device_type}"
        require(can_run, "kernel", kernel, must, "set it to 'auto'")
    if kernel == "compile" and device_type == "cpu":
        can_compile = _has_cpp_compiler()
        remedy = "install g++, or set it to 'auto'"
        require(can_compile, "kernel", kernel, "needs a C++ compiler", remedy)
    return kernel


def _choose_for_device(device_type: str, vocab_size: int) -> str:
    """Return what ``auto`` means, and log the reason."""
    if device_type == "cuda":
        chosen = "triton"
        reason = "a CUDA device"
    elif vocab_size < _SMALL_VOCABULARY:
        chosen = "reference"
        reason = f"a vocabulary of {vocab_size}"
    elif device_type == "cpu" and not _has_cpp_compiler():
        chosen = "reference"
        reason = "no C++ compiler; with g++ it would be compile"
    else:
        chosen = "compile"
        reason = f"a {device_type} device"
    logger.info("kernel: auto is %s here (%s).", chosen, reason)
    return chosen


def _has_cpp_compiler() -> bool:
    if os.environ.get("CXX"):
        return True
    for name in ("g++", "clang++"):
        if shutil.which(name):
            return True
    return False


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """Return the rows whose logits are held at a time where no ``chunk_size`` is given."""
    if device_type == "cpu":
        row_bytes = 4 * vocab_size
        num_rows = _CPU_BUFFER // row_bytes
        return max(num_rows, 16)
    return _GPU_ROWS
