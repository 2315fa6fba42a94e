"""Resources of the loss head's Triton kernels by GPU, compiled ahead of time without one.

    python benchmarks/kernel_resources.py [--json OUT] [--vocab-sizes 151936 ...]

The operations are called as the loss head calls them, on tensors without memory, so that types,
alignment and launch sizes are those of a real call. Registers, and ``stack`` in bytes, are per
thread; with a stack of 0 nothing spills. ``programs``, one row each, is how many an SM holds by
registers and threads. The last two columns are what correctness rests on: the integers that a
pointer is advanced by to its row, and whether a barrier parts all reads of a block from its writes,
as a gradient narrower than the logits needs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from hardware import hardware
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gspo.kernels.triton import gradient, statistics

ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
# Qwen2.5 to 3B and from 7B on, Llama 3, GPT-2 with odd rows.
VOCABULARIES = (151_936, 152_064, 128_256, 50_257)
REGISTERS, THREADS = 65_536, 2048  # of an SM of any of them
WARP_THREADS = 32
GRANTED_REGISTERS = 8  # a thread gets a multiple of this


class Driver:
    """A device that can be compiled for, and not run on."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        """Return a number for the device: Triton keeps compiled kernels by it."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", self.architecture, WARP_THREADS)


def calls(vocab_size: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield every kernel that the loss head launches, by name."""
    vector = torch.empty(4, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    wide = torch.empty(4, vocab_size, dtype=torch.float32, device="meta")
    narrow = torch.empty(4, vocab_size, dtype=torch.bfloat16, device="meta")
    for logits in (wide, narrow):
        yield f"statistics, {logits.dtype}", partial(statistics, logits, labels, vector)
    for logits, dtype in ((wide, narrow.dtype), (wide, wide.dtype), (narrow, narrow.dtype)):
        name = f"gradient, {logits.dtype} to {dtype}"
        call = partial(gradient, logits, labels, vector, vector, vector, vector, dtype=dtype)
        yield name, partial(call, d_entropy=None)
        yield f"{name}, entropy", partial(call, d_entropy=vector)


def compile_only(call: Callable[[], object], architecture: int) -> Any:
    """Return the kernel that ``call`` would launch."""
    run = JITFunction.run
    kernels = []

    def warm_up(*args: Any, **options: Any) -> None:
        options["warmup"] = True
        kernels.append(run(*args, **options))

    triton.runtime.driver.set_active(Driver(architecture))
    JITFunction.run = warm_up
    try:
        call()
    finally:
        JITFunction.run = run
    (kernel,) = kernels
    return kernel


def resources(kernel: Any) -> dict[str, Any]:
    """Return the figures of the machine code, and of the code that it was made from."""
    used = machine_resources(kernel.asm["cubin"])
    threads = WARP_THREADS * kernel.metadata.num_warps
    granted = -(-used["REG"] // GRANTED_REGISTERS) * GRANTED_REGISTERS
    return {
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "programs": min(THREADS // threads, REGISTERS // (granted * threads)),
        "row_offsets": row_offsets(kernel.asm["ttir"]),
        "barrier": has_barrier(kernel.asm["ptx"]),
    }


def machine_resources(cubin: bytes) -> dict[str, int]:
    """Return what cuobjdump says of the machine code, by its names."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def row_offsets(ttir: str) -> list[str]:
    """Return the types of the integers that a pointer is advanced by to its row."""
    return sorted(set(re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (i\d+)", ttir)))


def has_barrier(ptx: str) -> bool:
    """Return whether the code is loads, then barriers, then stores, and nothing else in between."""
    instructions = re.findall(r"ld\.global|bar\.sync|st\.global", ptx)
    order = "".join(instruction[0] for instruction in instructions)
    return re.fullmatch("l+bs+", order) is not None


def table_line(row: dict[str, Any]) -> str:
    """Return a row of figures as a line of text."""
    return (
        f"{row['target']:<9}{row['vocab_size']:<9}{row['kernel']:45}{row['registers']:9}"
        f"{row['stack']:7}{row['shared']:8}{row['warps']:7}{row['programs']:10}"
        f"{' '.join(row['row_offsets']):>13}{row['barrier']!s:>9}"
    )


def main() -> None:
    """Compile all, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=VOCABULARIES)
    options = parser.parse_args()
    results = []
    print(f"{'':63}registers  stack  shared  warps  programs  row offsets  barrier")
    for architecture in ARCHITECTURES:
        for vocab_size in options.vocab_sizes:
            target = {"target": f"sm_{architecture}", "vocab_size": vocab_size}
            for name, call in calls(vocab_size):
                kernel = {"kernel": name.replace("torch.", "")}
                row = target | kernel | resources(compile_only(call, architecture))
                results.append(row)
                print(table_line(row))
    if options.json:
        report = {"hardware": hardware() | {"triton": triton.__version__}, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
