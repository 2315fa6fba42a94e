"""Which backend of the loss head runs, and how many rows of logits it holds at a time."""

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
    require(kernel in KERNELS, "kernel", kernel, f"must be one of {', '.join(KERNELS)}")
    if kernel == "auto":
        return _choose_for_device(device_type, vocab_size)
    if kernel == "triton":
        can_run = device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        must = f"needs a CUDA device, not {device_type}"
        require(can_run, "kernel", kernel, must, "set it to 'auto'")
    if kernel == "compile" and device_type == "cpu":
        remedy = "install g++, or set it to 'auto'"
        require(_has_cpp_compiler(), "kernel", kernel, "needs a C++ compiler", remedy)
    return kernel


def _choose_for_device(device_type: str, vocab_size: int) -> str:
    """Return what ``auto`` means, and log the reason."""
    if device_type == "cuda":
        chosen, reason = "triton", "a CUDA device"
    elif vocab_size < _SMALL_VOCABULARY:
        chosen, reason = "reference", f"a vocabulary of {vocab_size}"
    elif device_type == "cpu" and not _has_cpp_compiler():
        chosen, reason = "reference", "no C++ compiler; with g++ it would be compile"
    else:
        chosen, reason = "compile", f"a {device_type} device"
    logger.info("kernel: auto is %s here (%s).", chosen, reason)
    return chosen


def _has_cpp_compiler() -> bool:
    return bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """Return the rows whose logits are held at a time where no ``chunk_size`` is given."""
    if device_type == "cpu":
        return max(_CPU_BUFFER // (4 * vocab_size), 16)
    return _GPU_ROWS
