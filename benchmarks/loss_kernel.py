"""Time, memory and error of loss heads, beside other packages' and plain torch.

    python benchmarks/loss_kernel.py --device cpu --json benchmarks/results/DATE-loss_kernel.json

Forward and backward are measured together. Every provider (``loss_kernel_providers.py``) gets the
same hidden states, head and documents (``loss_kernel_cases.py``) and computes the same clipped
objective, at a ratio near 1, so that the gradient is known: ``-advantage / (documents x tokens of
the document)`` per log-probability.

Documents are log-normal in length and packed; those that take ``[B, S]`` rows only get documents of
one length instead, as many tokens in all and without padding. Logits are as sharp as a trained
model's (mean top probability 0.8). ``f`` is the share of documents without advantage, ``m`` the
share of each document's rows without a label.

First each provider's log-probabilities and gradients are compared with float64, then all are timed
in turn, round by round. Peak memory is beyond what was there before the call, gradients included.
Rivals come with ``pip install 'gspo[bench]'``; one that is not there, fails, or needs another
device, is left out and named. ``--counts`` does the arithmetic of ``loss_kernel_counts.py``
instead.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hardware import hardware
from loss_kernel_cases import EVEN_LENGTH, Case, Exact, exact, make_case
from loss_kernel_counts import BYTES, FLOPS, counts, line
from loss_kernel_providers import PROVIDERS, Provider
from torch import Tensor
from tqdm import tqdm

from gspo.parallel import prepare_device

# Median and longest document, in rows: within a chunk of the device's.
LENGTHS = {"cpu": (128, 512), "cuda": (400, 4096)}
SHAPES = {  # T, H, V
    "cpu": [(4096, 512, 32_768)],
    "cuda": [(8192, 1536, 151_936), (8192, 3584, 152_064), (32_768, 1536, 151_936)],
}
CASES = [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0)]  # m, f
MIB = 2**20


@dataclass
class Call:
    """A provider on a case, and the figures about it."""

    provider: Provider
    case: Case
    row: dict[str, Any]


def run(provider: Provider, case: Case) -> tuple[Tensor | None, Tensor, Tensor]:
    """Run one forward and backward: log-probabilities if the provider gives them, dX, dW."""
    hidden = case.hidden.detach().requires_grad_()
    weight = case.weight.detach().requires_grad_()
    loss, logps = provider.run(case, hidden, weight)
    loss.backward()
    return logps, hidden.grad, weight.grad


def errors(provider: Provider, case: Case, truth: Exact) -> dict[str, float | None]:
    """Return the largest error of a log-probability, and relative errors of dX and dW."""
    logps, d_hidden, d_weight = run(provider, case)
    logp_error = None
    if logps is not None:
        differences = logps.detach().double() - truth.logps
        logp_error = float(differences[case.labelled].abs().max())
    return {
        "logp_err": logp_error,
        "dx_err": relative_error(d_hidden, truth.d_hidden),
        "dw_err": relative_error(d_weight, truth.d_weight),
    }


def relative_error(values: Tensor, truth: Tensor) -> float:
    """Return the relative Frobenius error."""
    return float((values.double() - truth).norm() / truth.norm())


def peak_mib(provider: Provider, case: Case) -> float:
    """Return the most memory beyond what was there before the call, gradients included."""
    if case.hidden.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(provider, case)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _process_kib("VmRSS")
    run(provider, case)
    return (_process_kib("VmHWM") - before) / 1024


def _process_kib(name: str) -> int:
    """Return a line of this process's status, in KiB."""
    for status_line in Path("/proc/self/status").read_text().splitlines():
        if status_line.startswith(name):
            return int(status_line.split()[1])
    raise KeyError(name)


def milliseconds(provider: Provider, case: Case) -> float:
    """Return the wall time of one forward and backward."""
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run(provider, case)
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begin)


def measure(shape: tuple[int, int, int], args: argparse.Namespace) -> list[dict]:
    """Return the rows of one shape.

    Cases and providers are timed in turn, round by round, so that ratios hold between all.
    """
    prepare_device(torch.device(args.device))  # as a run does
    providers = wanted_providers(args.device, args.only)
    calls: list[Call] = []
    for m, f in CASES:
        calls += check(shape, m, f, providers, args)
    calls = [call for call in calls if call.provider in providers]  # those that no case has refused
    time_in_turn(calls, args.rounds, description=f"T, H, V {shape}")
    return [call.row for call in calls]


def wanted_providers(device: str, only: list[str] | None) -> list[Provider]:
    """Return the providers that run on a device, and whose name holds one of some words."""
    wanted = []
    for provider in PROVIDERS:
        is_named = not only or any(word in provider.name for word in only)
        if is_named and device in provider.devices:
            wanted.append(provider)
    return wanted


def check(
    shape: tuple[int, int, int],
    m: float,
    f: float,
    providers: list[Provider],
    args: argparse.Namespace,
) -> list[Call]:
    """Compare each provider with float64 on one case, and measure its memory.

    A provider that cannot be imported, or fails here, is named and taken from ``providers``: a
    rival's own mistake must not cost the others their figures.
    """
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    lengths = tuple(args.lengths or LENGTHS[args.device])
    options = {"dtype": dtype, "device": args.device}
    packed = make_case(shape, m, f, lengths=lengths, **options)
    even = make_case(shape, m, f, lengths=None, **options)
    packed_truth = exact(packed)
    even_truth = exact(even)
    inputs = {"device": args.device, "dtype": str(dtype).removeprefix("torch.")}
    inputs |= dict(zip("THV", shape, strict=True)) | {"m": m, "f": f}
    calls = []
    for provider in list(providers):
        case = packed if provider.packed else even
        truth = packed_truth if provider.packed else even_truth
        try:
            row = {"provider": provider.name} | inputs | errors(provider, case, truth)
        except Exception as error:
            tqdm.write(f"{provider.name}: left out, {type(error).__name__}: {error}")
            args.left_out[provider.name] = f"{type(error).__name__}: {error}"[:1000]
            providers.remove(provider)
            continue
        row["lengths"] = list(lengths) if provider.packed else [EVEN_LENGTH, EVEN_LENGTH]
        row["peak_mib"] = round(peak_mib(provider, case), 1)
        calls.append(Call(provider, case, row))
    return calls


def time_in_turn(calls: list[Call], rounds: int, *, description: str) -> None:
    """Add median, 10th and 90th percentile of the wall times to each call's row."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in tqdm(range(rounds), desc=description):
        for call, call_times in zip(calls, times, strict=True):
            call_times.append(milliseconds(call.provider, call.case))
    for call, call_times in zip(calls, times, strict=True):
        ordered = sorted(call_times)
        tail = len(ordered) // 10
        call.row["ms_median"] = statistics.median(ordered)
        call.row["ms_p10"] = ordered[tail]
        call.row["ms_p90"] = ordered[-1 - tail]


def table(rows: list[dict]) -> None:
    """Print the rows of one shape, with ratios to eager, and what skipping saves."""
    times = {(row["provider"], row["m"], row["f"]): row["ms_median"] for row in rows}
    for m, f in CASES:
        print(f"m {m}, f {f}")
        for row in rows:
            if (row["m"], row["f"]) == (m, f):
                print(table_line(row, times.get(("eager", m, f))))
    for name in dict.fromkeys(row["provider"] for row in rows):
        whole = times[name, 0.0, 0.0]
        without_advantage = times[name, 0.0, 0.5] / whole
        without_label = times[name, 0.5, 0.0] / whole
        print(
            f"{name:34s} time(f 0.5) / time(f 0) {without_advantage:.2f}, "
            f"time(m 0.5) / time(m 0) {without_label:.2f}"
        )


def table_line(row: dict, eager_ms: float | None) -> str:
    """Return a row as a line of text, with its ratio to eager where that was measured."""
    ratio = f"{eager_ms / row['ms_median']:5.2f}x eager" if eager_ms else ""
    logp = "      -" if row["logp_err"] is None else f"{row['logp_err']:.1e}"
    spread = f"({row['ms_p10']:.0f} to {row['ms_p90']:.0f})"
    return (
        f"  {row['provider']:32s} {row['ms_median']:8.1f} ms {spread:16s} {ratio} "
        f"{row['peak_mib']:7.0f} MiB  "
        f"errors: logp {logp}, dX {row['dx_err']:.1e}, dW {row['dw_err']:.1e}"
    )


def report_counts(path: Path | None) -> None:
    """Print the arithmetic for the shapes of a GPU, and write it."""
    rows: list[dict] = []
    for shape in SHAPES["cuda"]:
        for m, f in CASES:
            rows += counts(shape, m, f)
    for row in rows:
        print(line(row))
    write({"run_on": None, "flop_per_s": FLOPS, "bytes_per_s": BYTES, "rows": rows}, path)


def write(report: dict, path: Path | None) -> None:
    """Write a report as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--json", type=Path, help="write the rows here")
    add("--rounds", type=int, default=7)
    add("--only", nargs="+", help="providers whose name holds one of these")
    add("--shape", nargs=3, type=int, metavar=("T", "H", "V"), help="instead of the device's own")
    add(
        "--lengths",
        nargs=2,
        type=int,
        metavar=("MEDIAN", "LONGEST"),
        help="of the documents, in rows",
    )
    add("--counts", action="store_true", help="only arithmetic: operations, bytes, expected times")
    return parser.parse_args()


def main() -> None:
    """Measure every shape and case, print tables, and write the rows."""
    args = parse_arguments()
    if args.counts:
        report_counts(args.json)
        return
    args.left_out = {}
    rows: list[dict] = []
    for shape in [tuple(args.shape)] if args.shape else SHAPES[args.device]:
        shape_rows = measure(shape, args)
        print("T {}, H {}, V {}".format(*shape))
        table(shape_rows)
        rows += shape_rows
    write(hardware() | {"left_out": args.left_out, "rows": rows}, args.json)


if __name__ == "__main__":
    main()
