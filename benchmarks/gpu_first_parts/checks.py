"""The tests that need a GPU, and what they leave to a real shape: exactness and races."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from loss_kernel import errors
from loss_kernel_cases import exact as exact_results
from loss_kernel_cases import make_case
from loss_kernel_providers import PROVIDERS

from gpu_first_parts.visit import Visit, free_memory
from gpu_first_parts.wheels import ROOT
from gspo.kernels import triton as kernels

_OUTCOMES = ("tests", "failures", "errors", "skipped")
_EXACT = ("gspo linear_loss", "gspo linear_logps")
_LENGTHS = (400, 4096)  # median and longest document, in rows


def suite(visit: Visit) -> dict[str, Any]:
    """Run the tests marked ``gpu``; a module that cannot be collected is counted as an error."""
    import pytest  # noqa: F401  where it is missing, this is skipped

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        options = ["-q", "-p", "no:cacheprovider", "--junitxml", str(report)]
        command = [sys.executable, "-m", "pytest", *options, *visit.sizes.tests]
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        root = ElementTree.parse(report).getroot()
    counts = dict.fromkeys(_OUTCOMES, 0)
    for tests in root.iter("testsuite"):
        for outcome in _OUTCOMES:
            counts[outcome] += int(tests.get(outcome, 0))
    problems = _problems(root)
    says = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    return {"counts": counts, "problems": problems, "says": "; ".join([says, *problems[:3]])}


def _problems(root: ElementTree.Element) -> list[str]:
    """Return a line for each test that failed."""
    problems = []
    for case in root.iter("testcase"):
        for kind in ("failure", "error"):
            for problem in case.iter(kind):
                message = " ".join((problem.get("message") or "").split())[:300]
                problems.append(f"{case.get('classname')}.{case.get('name')}: {message}")
    return problems


def exact(visit: Visit) -> dict[str, Any]:
    """Compare the head's log-probabilities and gradients with float64 at a real shape."""
    sizes = visit.sizes
    shape = (sizes.num_rows, sizes.hidden_size, sizes.vocab_size)
    case = make_case(shape, 0.0, 0.5, lengths=_LENGTHS, dtype=visit.dtype, device=str(visit.device))
    truth = exact_results(case)
    rows = {}
    says = []
    for provider in PROVIDERS:
        if provider.name in _EXACT:
            of_provider = errors(provider, case, truth)
            rows[provider.name] = of_provider
            says.append(f"{provider.name}: {_in_words(of_provider)}")
    del case, truth
    free_memory(visit.device)
    return {"shape": shape, "errors": rows, "says": "; ".join(says)}


def _in_words(values: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in values.items())


def gradient_bits(visit: Visit) -> dict[str, Any]:
    """Make the gradient in place of the same logits many times: do its bits ever differ?

    A program overwrites float32 logits with half as wide gradients while others of its threads
    still read; aligned and unaligned rows are loaded in different ways.
    """
    sizes = visit.sizes
    differing = {}
    for vocab_size in (sizes.prime_vocab_size, sizes.vocab_size):
        differing[str(vocab_size)] = _count_differing(visit, vocab_size)
    runs = sizes.num_same_runs
    says = [f"{count} of {runs} differ at V {size}" for size, count in differing.items()]
    return {"runs": runs, "differing": differing, "says": ", ".join(says)}


def _count_differing(visit: Visit, vocab_size: int) -> int:
    """Return how many runs differ from the first."""
    num_rows, device = visit.sizes.bits_rows, visit.device
    generator = torch.Generator(device).manual_seed(vocab_size)
    logits = 3 * torch.randn(num_rows, vocab_size, device=device, generator=generator)
    labels = torch.randint(0, vocab_size, (num_rows,), device=device, generator=generator)
    temperature = torch.ones(num_rows, device=device)
    d_logps = torch.randn(num_rows, device=device, generator=generator)
    _, log_z, entropy = kernels.statistics(logits, labels, temperature)
    first = None
    num_differing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(visit.sizes.num_same_runs):
        gradient = kernels.gradient(
            logits.clone(), labels, temperature, log_z, entropy, d_logps, None, torch.bfloat16
        )
        bits = gradient.view(torch.int16)  # so that nan equals nan
        if first is None:
            first = bits.clone()
        num_differing += (bits != first).any()
    return int(num_differing)
