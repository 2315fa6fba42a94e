"""Time, memory and error of loss heads, forward and backward, beside other packages' and plain torch.

    python benchmarks/loss_kernel.py --device cpu --json benchmarks/results/DATE-loss_kernel-cpu.json

Every provider gets the same hidden states, head and documents and computes the same clipped objective, at a ratio near
1, so that the gradient is known: ``-advantage / (documents x tokens of the document)`` per log-probability. Documents
are log-normal in length and packed; those that take ``[B, S]`` rows only get documents of one length instead, as many
tokens in all and without padding. Logits are as sharp as a trained model's (mean top probability 0.8). ``f`` is the
share of documents without advantage, ``m`` the share of each document's rows without a label.

First each provider's log-probabilities and gradients are compared with float64, then all are timed in turn, round by
round. Peak memory is beyond what was there before the call, gradients included. Rivals come with ``pip install
'gspo[bench]'``; one that is not there, or needs another device, is left out and named.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from hardware import hardware
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from gspo.kernels import linear_logps, linear_loss, logits_logps

LENGTHS = {
    "cpu": (128, 512),
    "cuda": (400, 4096),
}  # median and longest document: within a chunk of the device's
SHAPES = {
    "cpu": [(4096, 512, 32_768)],
    "cuda": [(8192, 1536, 151_936), (8192, 3584, 152_064), (32_768, 1536, 151_936)],
}
CASES = [(0.0, 0.0), (0.0, 0.5), (0.5, 0.0)]  # m, f
TOP_PROBABILITY = 0.8
FLOPS, BYTES = 790e12, 4.3e12  # a second, bf16 products and memory: what an H200 has reached
MIB = 2**20


@dataclass
class Case:
    """Inputs of one measurement. Rows of a document stand together."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [T]
    labelled: Tensor  # [T] bool
    lengths: list[int]  # rows of each document
    advantages: Tensor  # [D]
    old_logps: Tensor  # [T], float32

    def __post_init__(self) -> None:
        self.document = torch.arange(len(self.lengths)).repeat_interleave(
            torch.tensor(self.lengths)
        )
        self.document = self.document.to(self.hidden.device)
        counts = torch.zeros(len(self.lengths), device=self.hidden.device)
        self.counts = counts.index_add(0, self.document, self.labelled.float())
        self.rows = self.labelled.nonzero().squeeze(-1)
        self.host_counts = [int(x) for x in self.counts.tolist()]
        self.temperature = torch.ones_like(self.old_logps)

    def loss(self, logps: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """The objective from log-probabilities of ``rows``, undivided sums already divided."""
        d = self.document[rows]
        ratio = (logps - self.old_logps[rows]).exp()
        a = self.advantages[d] / (self.counts[d] * len(self.lengths))
        surrogate = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        return torch.where(self.labelled[rows], surrogate, 0.0).sum()


def make_case(
    shape: tuple[int, int, int],
    m: float,
    f: float,
    *,
    lengths: tuple[int, int] | None,
    dtype: torch.dtype,
    device: str,
) -> Case:
    """A case; the same seed gives the same hidden states and head whatever the lengths."""
    num_tokens, hidden_size, vocab_size = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * hidden_size**-0.5
    likely = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    noise = torch.randn(num_tokens, hidden_size, generator=generator)
    hidden = _sharpness(vocab_size, hidden_size) * weight[likely] + noise
    other = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    labels = torch.where(
        torch.rand(num_tokens, generator=generator) < TOP_PROBABILITY, likely, other
    )
    documents = _documents(num_tokens, lengths, generator)
    labelled = torch.cat([torch.arange(n) >= round(m * n) for n in documents])
    advantages = torch.randn(len(documents), generator=generator)
    order = torch.randperm(len(documents), generator=generator).tolist()
    dead = 0
    for d in order:  # by rows, as the work is
        if dead + documents[d] / 2 < f * num_tokens:
            advantages[d] = 0
            dead += documents[d]
    hidden, weight = hidden.to(device, dtype), weight.to(device, dtype)
    labels, labelled = labels.to(device), labelled.to(device)
    case = Case(
        hidden,
        weight,
        labels,
        labelled,
        documents,
        advantages.to(device),
        torch.zeros(num_tokens, device=device),
    )
    case.old_logps = exact_logps(case).float()
    return case


@cache
def _sharpness(vocab_size: int, hidden_size: int) -> float:
    """How much of the likely token's row a hidden state holds for a mean top probability of 0.8, by bisection."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) * hidden_size**-0.5
    noise = torch.randn(128, hidden_size, generator=generator)
    low, high = 0.0, 64.0
    for _ in range(12):
        middle = (low + high) / 2
        top = ((middle * weight[:128] + noise) @ weight.T).softmax(-1).amax(-1).mean()
        low, high = (middle, high) if top < TOP_PROBABILITY else (low, middle)
    return low


def _documents(
    num_tokens: int, lengths: tuple[int, int] | None, generator: torch.Generator
) -> list[int]:
    """Rows of each: log-normal with a median and a longest, or 256 each."""
    if lengths is None:
        return [256] * (num_tokens // 256)
    found: list[int] = []
    while (left := num_tokens - sum(found)) > 0:
        drawn = lengths[0] * torch.exp(0.8 * torch.randn((), generator=generator))
        found.append(min(int(drawn.clamp(8, lengths[1])), left))
    return found


def _chunks(case: Case) -> list[slice]:
    return [slice(i, i + 512) for i in range(0, case.labels.numel(), 512)]


@torch.no_grad()
def exact_logps(case: Case) -> Tensor:
    """Log-probabilities in float64, [T]."""
    weight = case.weight.double()
    parts = [
        (case.hidden[rows].double() @ weight.T)
        .log_softmax(-1)
        .gather(-1, case.labels[rows, None])
        .squeeze(-1)
        for rows in _chunks(case)
    ]
    return torch.cat(parts)


@torch.no_grad()
def exact_gradients(case: Case) -> tuple[Tensor, Tensor]:
    """The gradients of hidden states and head in float64."""
    logps = case.old_logps.double().requires_grad_()
    with torch.enable_grad():
        (coefficients,) = torch.autograd.grad(case.loss(logps), logps)
    weight = case.weight.double()
    d_hidden, d_weight = (
        torch.zeros_like(case.hidden, dtype=torch.float64),
        torch.zeros_like(weight),
    )
    for rows in _chunks(case):
        hidden = case.hidden[rows].double()
        gradient = -coefficients[rows, None] * (hidden @ weight.T).softmax(-1)
        gradient[torch.arange(hidden.shape[0]), case.labels[rows]] += coefficients[rows]
        d_hidden[rows] = gradient @ weight
        d_weight += gradient.T @ hidden
    return d_hidden, d_weight


Provider = Callable[
    [Case, Tensor, Tensor], tuple[Tensor, Tensor | None]
]  # loss, and log-probabilities [T] if at hand


def _of_rows(case: Case, logps: Tensor) -> Tensor:
    return case.old_logps.new_zeros(case.labels.numel()).index_put((case.rows,), logps.detach())


def ours_loss(kernel: str) -> Provider:
    """One phase: the gradients are done with the forward."""

    def run(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, kept = case.rows, []

        def seam(logps: Tensor, entropy: Tensor, first: int, last: int) -> tuple[Tensor, dict]:
            start = sum(case.host_counts[:first])
            kept.append(logps)
            return case.loss(logps, rows[start : start + logps.numel()]), {}

        arguments = (
            hidden.index_select(0, rows),
            weight,
            case.labels[rows],
            case.temperature[rows],
            case.host_counts,
            seam,
        )
        loss, _ = linear_loss(*arguments, kernel=kernel)
        return loss, _of_rows(case, torch.cat(kept))

    return run


def ours_logps(kernel: str) -> Provider:
    """Two phases."""

    def run(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = case.rows
        logps, _ = linear_logps(
            hidden.index_select(0, rows),
            weight,
            case.labels[rows],
            case.temperature[rows],
            kernel=kernel,
        )
        return case.loss(logps, rows), _of_rows(case, logps)

    return run


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, loss, *gradients):  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, d_loss):  # type: ignore[no-untyped-def]
        return *(x.mul_(d_loss) for x in ctx.gradients), None, None, None


def plain(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """One phase in plain torch, as short as can be: 512 rows at a time in one buffer, not compiled, no entropy."""
    h, w = hidden.detach(), weight.detach()
    buffer = h.new_empty(512, w.shape[0])
    d_hidden, d_weight = torch.zeros_like(h), torch.zeros_like(w)
    loss, kept = h.new_zeros(()), []
    for rows in case.rows.split(
        512
    ):  # the seam here takes tokens one by one, so a document may lie in two chunks
        x, labels = h[rows], case.labels[rows, None]
        p = torch.mm(x, w.T, out=buffer[: rows.numel()])
        label_logits, largest = p.gather(-1, labels), p.amax(-1, keepdim=True)
        total = p.sub_(largest).exp_().sum(-1, keepdim=True)
        logps = (label_logits - largest - total.log()).squeeze(-1).requires_grad_()
        with torch.enable_grad():
            part = case.loss(logps, rows)
            (c,) = torch.autograd.grad(part, logps)
        kept.append(logps)
        loss += part.detach()
        active = c.nonzero().squeeze(-1)
        if active.numel() < rows.numel():
            p, x, labels, c, total = (y[active] for y in (p, x, labels, c, total))
        p.mul_(-c[:, None] / total).scatter_add_(-1, labels, c[:, None])
        d_hidden[rows[active]] = p @ w
        d_weight.addmm_(p.T, x)
    return _KnownGradients.apply(hidden, weight, loss, d_hidden, d_weight), _of_rows(
        case, torch.cat(kept)
    )


def ours_logits(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits held, overwritten by their gradient: three products."""
    logits = hidden @ weight.T
    logps, _ = logits_logps(logits, case.labels, case.temperature)
    return case.loss(logps), logps


def eager(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """All logits, log-softmax in float32, gather."""
    logps = (hidden @ weight.T).float().log_softmax(-1).gather(-1, case.labels[:, None]).squeeze(-1)
    return case.loss(logps), logps


def _chunk_logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


@cache
def _compiled_chunk() -> Callable[..., Tensor]:
    return torch.compile(_chunk_logps)


def compiled_chunks(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """torch.compile'd chunks of 1,024 rows, computed again in the backward."""
    parts = [
        checkpoint(_compiled_chunk(), h, weight, y, use_reentrant=False)
        for h, y in zip(hidden.split(1024), case.labels.split(1024), strict=True)
    ]
    logps = torch.cat(parts)
    return case.loss(logps), logps


def trl(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """TRL's selective log-softmax on all logits."""
    from trl.trainer.utils import selective_log_softmax

    logps = selective_log_softmax((hidden @ weight.T)[None], case.labels[None])[0]
    return case.loss(logps), logps


@cache
def _liger(chunk_size: int) -> torch.nn.Module:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    return LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=True,
        use_ref_model=False,
        chunk_size=chunk_size,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type="grpo",
    )


def liger(chunk_size: int) -> Provider:
    """Liger's fused linear GRPO, ``chunk_size`` documents at a time."""

    def run(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        shape = (len(case.lengths), case.lengths[0])
        loss, _ = _liger(chunk_size)(
            hidden.view(*shape, -1),
            weight,
            case.labels.view(shape),
            case.labelled.view(shape).long(),
            case.advantages,
            old_per_token_logps=case.old_logps.view(shape),
        )
        return loss, None

    return run


def liger_triton(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Liger's Triton GRPO on all logits."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    shape = (len(case.lengths), case.lengths[0])
    logits = (hidden @ weight.T).view(*shape, -1)
    logits = torch.cat((logits, logits[:, -1:]), 1)  # it drops the last place
    per_token, *_ = triton_grpo_loss(
        logits,
        case.old_logps.view(shape),
        None,
        case.labels.view(shape),
        case.advantages,
        completion_mask=case.labelled.view(shape).long(),
        temperature=1.0,
        beta=0.0,
        eps_low=0.2,
        eps_high=0.2,
        inplace=True,
    )
    return (per_token / (case.counts[:, None] * len(case.lengths))).sum(), None


def verl(case: Case, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Triton linear cross entropy of verl."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    logps, _ = linear_cross_entropy(hidden, weight, case.labels, 1.0, "none")
    return case.loss(logps), logps


# name -> (provider, takes packed documents, devices)
PROVIDERS: dict[str, tuple[Provider, bool, tuple[str, ...]]] = {
    "gspo linear_loss": (ours_loss("auto"), True, ("cpu", "cuda")),
    "gspo linear_logps": (ours_logps("auto"), True, ("cpu", "cuda")),
    "gspo logits_logps": (ours_logits, True, ("cpu", "cuda")),
    "gspo reference": (ours_logps("reference"), True, ("cpu", "cuda")),
    "plain one phase": (plain, True, ("cpu", "cuda")),
    "eager": (eager, True, ("cpu", "cuda")),
    "compiled chunks": (compiled_chunks, True, ("cpu", "cuda")),
    "trl selective_log_softmax": (trl, True, ("cpu", "cuda")),
    "liger fused linear, 1 document": (liger(1), False, ("cpu", "cuda")),
    "liger fused linear, 4 documents": (liger(4), False, ("cpu", "cuda")),
    "liger triton": (liger_triton, False, ("cuda",)),
    "verl triton": (verl, True, ("cuda",)),
}


def run(provider: Provider, case: Case) -> tuple[Tensor | None, Tensor, Tensor]:
    """One forward and backward: log-probabilities if the provider gives them, dX, dW."""
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    loss, logps = provider(case, hidden, weight)
    loss.backward()
    return logps, hidden.grad, weight.grad


def errors(
    provider: Provider, case: Case, exact: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float | None]:
    """Largest error of a log-probability, and relative Frobenius errors of dX and dW."""
    logps, *gradients = run(provider, case)
    difference = (
        None
        if logps is None
        else float((logps.detach().double() - exact[0])[case.labelled].abs().max())
    )
    found = [
        float((g.double() - e).norm() / e.norm()) for g, e in zip(gradients, exact[1:], strict=True)
    ]
    return {"logp_err": difference, "dx_err": found[0], "dw_err": found[1]}


def peak_mib(provider: Provider, case: Case) -> float:
    """The most memory beyond what was there before the call, gradients included."""
    if case.hidden.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(provider, case)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    run(provider, case)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """KiB."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1])


def seconds(provider: Provider, case: Case) -> float:
    """Wall time of one forward and backward."""
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run(provider, case)
    if case.hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(shape: tuple[int, int, int], args: argparse.Namespace) -> list[dict]:
    """Rows of one shape. Cases and providers are timed in turn, round by round, so that ratios hold between all."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    calls: list[tuple[Provider, Case]] = []
    rows: list[dict] = []
    missing: set[str] = set()
    for m, f in CASES:
        options = {"dtype": dtype, "device": args.device}
        lengths = tuple(args.lengths or LENGTHS[args.device])
        cases = {
            packed: make_case(shape, m, f, lengths=lengths if packed else None, **options)
            for packed in (True, False)
        }
        exact = {
            packed: (exact_logps(case), *exact_gradients(case)) for packed, case in cases.items()
        }
        for name, (provider, packed, devices) in PROVIDERS.items():
            wanted = args.device in devices and (
                not args.only or any(part in name for part in args.only)
            )
            if not wanted or name in missing:
                continue
            try:
                found = errors(provider, cases[packed], exact[packed])
            except ImportError as error:
                tqdm.write(f"{name}: left out, {error}")
                missing.add(name)
                continue
            row = {
                "provider": name,
                "device": args.device,
                "dtype": str(dtype).removeprefix("torch."),
            }
            row |= dict(zip("THV", shape, strict=True)) | {"m": m, "f": f} | found
            row["lengths"] = list(lengths) if packed else [256, 256]
            row["peak_mib"] = round(peak_mib(provider, cases[packed]), 1)
            rows.append(row)
            calls.append((provider, cases[packed]))
        del exact
    times = [
        [1000 * seconds(*call) for call in calls]
        for _ in tqdm(range(args.rounds), desc=f"T, H, V {shape}")
    ]
    for row, found in zip(rows, zip(*times, strict=True), strict=True):
        ordered = sorted(found)
        row["ms_median"] = statistics.median(ordered)
        row["ms_p10"], row["ms_p90"] = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return rows


def table(rows: list[dict]) -> None:
    """Prints the rows of one shape, with ratios to eager in the same case, and what skipping saves."""
    times = {(row["provider"], row["m"], row["f"]): row["ms_median"] for row in rows}
    for m, f in CASES:
        print(f"m {m}, f {f}")
        for row in rows:
            if (row["m"], row["f"]) != (m, f):
                continue
            eager_ms = times.get(("eager", m, f))
            ratio = f"{eager_ms / row['ms_median']:5.2f}x eager" if eager_ms else ""
            logp = "      -" if row["logp_err"] is None else f"{row['logp_err']:.1e}"
            spread = f"({row['ms_p10']:.0f} to {row['ms_p90']:.0f})"
            print(
                f"  {row['provider']:32s} {row['ms_median']:8.1f} ms {spread:16s} {ratio} {row['peak_mib']:7.0f} MiB  "
                f"errors: logp {logp}, dX {row['dx_err']:.1e}, dW {row['dw_err']:.1e}"
            )
    for name in dict.fromkeys(row["provider"] for row in rows):
        whole = times[name, 0.0, 0.0]
        print(f"{name:34s} time(f 0.5) / time(f 0) {times[name, 0.0, 0.5] / whole:.2f}", end="")
        print(f", time(m 0.5) / time(m 0) {times[name, 0.5, 0.0] / whole:.2f}")


def counts(shape: tuple[int, int, int], m: float, f: float, chunk: int = 4096) -> list[dict]:
    """Operations and bytes of each path by arithmetic, in bf16 with float32 logits, without what caches save.

    Per row and word: a product writes 4 bytes of logits, the statistics read them, the gradient reads 4 and writes 2,
    each of its products reads 2. Per chunk: the head is read by two products (2 bytes a number), and its float32
    gradient is read and written. The products take the longer of their operations and their bytes, the rest its bytes.
    """
    num_tokens, hidden_size, vocab_size = shape
    rows = num_tokens * (1 - m)
    active, unit, head = (
        rows * (1 - f),
        2 * rows * hidden_size * vocab_size,
        hidden_size * vocab_size,
    )
    logits = rows * vocab_size
    again = {"linear_loss": 0.0, "linear_logps": active, "logits_logps": 0.0}
    found = []
    for path, recomputed in again.items():
        chunks, in_memory = -(-rows // chunk), path == "logits_logps"
        operations = unit * (1 + (recomputed + 2 * (rows if in_memory else active)) / rows)
        logit_bytes = 4 * (logits + recomputed * vocab_size) + 4 * active * vocab_size
        product_bytes = logit_bytes + chunks * head * (2 + 2 + 8)
        row_bytes = 4 * logits + (4 + 2) * active * vocab_size
        seconds = max(operations / FLOPS, product_bytes / BYTES) + row_bytes / BYTES
        held = 4 * (logits if in_memory else min(chunk, rows) * vocab_size) + 4 * head
        found.append(
            {"path": path, "T": num_tokens, "H": hidden_size, "V": vocab_size, "m": m, "f": f}
            | {
                "units": operations / unit,
                "tflop": operations / 1e12,
                "product_gb": product_bytes / 1e9,
            }
            | {"row_gb": row_bytes / 1e9, "held_gib": held / 2**30, "ms": 1000 * seconds}
            | {"share_of_3_units": 3 * 2 * num_tokens * head / FLOPS / seconds}
        )
    return found


def main() -> None:
    """Measures every shape and case, prints tables, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="providers whose name holds one of these")
    parser.add_argument(
        "--shape", nargs=3, type=int, metavar=("T", "H", "V"), help="instead of the device's own"
    )
    parser.add_argument(
        "--lengths",
        nargs=2,
        type=int,
        metavar=("MEDIAN", "LONGEST"),
        help="of the documents, in rows",
    )
    parser.add_argument(
        "--counts", action="store_true", help="only arithmetic: operations, bytes, expected times"
    )
    args = parser.parse_args()
    rows: list[dict] = []
    if args.counts:
        for shape in SHAPES["cuda"]:
            for row in (row for m, f in CASES for row in counts(shape, m, f)):
                rows.append(row)
                print(
                    "  ".join(
                        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                        for k, v in row.items()
                    )
                )
        if args.json:
            rates = {"run_on": None, "flop_per_s": FLOPS, "bytes_per_s": BYTES}
            args.json.write_text(json.dumps(rates | {"rows": rows}, indent=2) + "\n")
        return
    for shape in [tuple(args.shape)] if args.shape else SHAPES[args.device]:
        found = measure(shape, args)
        print("T {}, H {}, V {}".format(*shape))
        table(found)
        rows += found
    if args.json:
        args.json.write_text(json.dumps(hardware() | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
