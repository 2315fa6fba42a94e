"""The progress bar, and how long a step takes."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn
from torchtune import config, utils
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from gspo.config import refusals
from gspo.metrics import public

_HELD_OUT = "eval/accuracy"
# Name on the bar -> metric.
_SHOWN = {
    "reward": "reward/mean",
    "held-out": _HELD_OUT,
    "clip": "clip/any_document",
    "tok/s": "tokens_per_second",
}
# Dense operations a second, from the data sheets.
_PEAK_BF16_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


class _Bar(tqdm):
    """A bar above which each line that is logged stands alone, on a terminal and in a file."""

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Write a line above the bars."""
        file = file or sys.stderr
        begin = "" if file.isatty() else "\n"  # nothing clears the bar in a file
        super().write(f"{begin}{s}", file, end, nolock)


class _LastResort(logging.Handler):
    """The handler of a logger without any, as ``logging.lastResort`` is, beside a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record above the bars."""
        line = self.format(record)
        _Bar.write(line)


@contextlib.contextmanager
def _lines_above_bar() -> Iterator[None]:
    """Write what is logged to the console above the bar, and not behind it."""
    loggers = []
    for logger in (logging.getLogger(), utils.get_logger()):
        streams = [getattr(handler, "stream", None) for handler in logger.handlers]
        if sys.stderr in streams or sys.stdout in streams:
            loggers.append(logger)
    last_resort = logging.lastResort
    logging.lastResort = _LastResort(logging.WARNING)
    try:
        with logging_redirect_tqdm(loggers, _Bar):
            yield
    finally:
        logging.lastResort = last_resort


class Progress:
    """A bar over the steps of a run, with the clock of run and steps.

    Args:
        num_steps: of the run.
        policy: its number of parameters is for the share of the device's peak.
        device: this rank's.
        shown: the bar is; the clock runs on every rank.
    """

    def __init__(
        self, num_steps: int, policy: nn.Module, device: torch.device, *, shown: bool
    ) -> None:
        self._num_steps = num_steps
        num_trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        num_parameters = getattr(policy, "num_parameters", num_trained)
        # Of a frozen weight there is a forward and the gradient of its input.
        self._operations_per_slot = 4 * num_parameters + 2 * num_trained
        self._device = device
        self._shown = shown
        self._held_out: dict[str, float] = {}
        self._run_began = time.perf_counter()

    def __enter__(self) -> Progress:
        """Show the bar and start the clock of the steps."""
        self._step_began = time.perf_counter()
        self._bar = _Bar(
            total=self._num_steps, disable=not self._shown, desc="steps", dynamic_ncols=True
        )
        self._above_bar = contextlib.ExitStack()
        if self._shown:
            self._above_bar.enter_context(_lines_above_bar())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the bar as it is."""
        self._above_bar.close()
        self._bar.close()

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._run_began

    def show(self, values: Mapping[str, float]) -> None:
        """Show the values that have a place on the bar, and a dash for one that is not there.

        Held-out accuracy stays: it is the last evaluation's.
        """
        current = public(values)
        if _HELD_OUT in current:
            self._held_out = {_HELD_OUT: current[_HELD_OUT]}
        current |= self._held_out
        shown = {}
        for name, metric in _SHOWN.items():
            shown[name] = f"{current[metric]:.3g}" if metric in current else "-"
        self._bar.set_postfix(shown)

    def advance(self, values: Mapping[str, float]) -> dict[str, float]:
        """Count a step and return its time and throughput.

        Args:
            values: metrics of the step.
        """
        now = time.perf_counter()
        seconds = now - self._step_began
        self._step_began = now
        speed = {"time/step": seconds, "tokens_per_second": values["_slots"] / seconds}
        speed |= self._on_gpu(values)
        self._bar.update()
        self.show({**values, **speed})
        return speed

    def _on_gpu(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the share of a known GPU's peak in the update (MFU, 6 N), and its memory."""
        device = self._device
        if device.type != "cuda":
            return {}
        shown = {
            "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "reserved_memory_gib": torch.cuda.max_memory_reserved(device) / 2**30,
            "alloc_retries": float(torch.cuda.memory_stats(device)["num_alloc_retries"]),
        }
        device_name = torch.cuda.get_device_name(device)
        for name, peak in _PEAK_BF16_FLOPS.items():
            if name in device_name:
                flops = self._operations_per_slot * values["_slots"]
                peak_flops = peak * dist.get_world_size() * values["time/update"]
                shown["mfu"] = flops / peak_flops
        return shown


def build_profiler(options: Mapping[str, Any] | None) -> Any:
    """Build torchtune's profiler, which does nothing unless ``enabled`` is among the options."""
    defaults = {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False}
    with refusals("profiler"):
        profiler, _ = config.instantiate(OmegaConf.create({**defaults, **(options or {})}))
    return profiler
