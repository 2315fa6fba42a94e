"""What the Triton kernels of the loss head take of each GPU, compiled ahead of time: no GPU is used.

    python benchmarks/kernel_resources.py [--json OUT] [--vocab-sizes 151936 ...]

The operations are called as the loss head calls them, on tensors without memory, so that types, alignment and launch
sizes are those of a real call. Registers, and ``stack`` in bytes, are per thread; with a stack of 0 nothing spills.
``programs``, one row each, is how many an SM holds by registers and threads. The last two columns are what correctness
rests on: the integers that a pointer is advanced by to its row, and whether a barrier parts all reads of a block from
its writes, as a gradient narrower than the logits needs.
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
VOCABULARIES = (
    151_936,
    152_064,
    128_256,
    50_257,
)  # Qwen2.5 to 3B and from 7B on, Llama 3, GPT-2 with odd rows
REGISTERS, THREADS = 65_536, 2048  # of an SM of any of them


class Driver:
    """A device that can be compiled for, and not run on."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device."""
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.architecture, 32)


def calls(vocab_size: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel that the loss head launches, by name."""
    vector = torch.empty(4, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta")
    wide, narrow = (
        torch.empty(4, vocab_size, dtype=x, device="meta") for x in (torch.float32, torch.bfloat16)
    )
    for logits in (wide, narrow):
        yield f"statistics, {logits.dtype}", partial(statistics, logits, labels, vector)
    for logits, dtype in ((wide, narrow.dtype), (wide, wide.dtype), (narrow, narrow.dtype)):
        call = partial(gradient, logits, labels, vector, vector, vector, vector, dtype=dtype)
        yield f"gradient, {logits.dtype} to {dtype}", partial(call, d_entropy=None)
        yield f"gradient, {logits.dtype} to {dtype}, entropy", partial(call, d_entropy=vector)


def compile_only(call: Callable[[], object], architecture: int) -> Any:
    """The kernel that ``call`` would launch."""
    run = JITFunction.run
    found = []
    triton.runtime.driver.set_active(Driver(architecture))
    JITFunction.run = lambda *args, **options: found.append(
        run(*args, **options | {"warmup": True})
    )
    try:
        call()
    finally:
        JITFunction.run = run
    (kernel,) = found
    return kernel


def resources(kernel: Any) -> dict[str, Any]:
    """Of the machine code; the last two of the code that it was made from."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    threads = 32 * kernel.metadata.num_warps
    granted = -(-used["REG"] // 8) * 8
    order = "".join(x[0] for x in re.findall(r"ld\.global|bar\.sync|st\.global", kernel.asm["ptx"]))
    return {
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "programs": min(THREADS // threads, REGISTERS // (granted * threads)),
        "row_offsets": sorted(
            set(re.findall(r"tt\.addptr .* : !tt\.ptr<\w+>, (i\d+)", kernel.asm["ttir"]))
        ),
        "barrier": re.fullmatch("l+bs+", order) is not None,
    }


def main() -> None:
    """Compiles all, prints the table and writes the JSON."""
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
            for name, call in calls(vocab_size):
                kernel = name.replace("torch.", "")
                found = resources(compile_only(call, architecture))
                results.append(
                    {"target": f"sm_{architecture}", "vocab_size": vocab_size, "kernel": kernel}
                    | found
                )
                print(
                    f"sm_{architecture:<6}{vocab_size:<9}{kernel:45}{found['registers']:9}{found['stack']:7}"
                    f"{found['shared']:8}{found['warps']:7}{found['programs']:10}{' '.join(found['row_offsets']):>13}"
                    f"{found['barrier']!s:>9}"
                )
    if options.json:
        report = {"hardware": hardware() | {"triton": triton.__version__}, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
