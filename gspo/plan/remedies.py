"""Changes that would save memory where a plan does not fit; each is planned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from gspo.config import Settings
from gspo.errors import InputError
from gspo.kernels import rows_per_chunk
from gspo.plan.estimate import Planner
from gspo.plan.layout import rows_at_once, samples_here

_ROWS_OF_A_SMALL_CHUNK = 1024
_LEAST_SAVING = 200  # the share of the peak below which a change is not worth naming, as 1 / n


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change, and the plan with it."""

    change: str  # in the words of a command line
    changes: dict[str, Any]
    world_size: int
    peak: int  # bytes
    moment: str
    saves: int  # bytes
    helps: bool  # a moment that does not fit takes less with it
    fits: bool


def remedies(planner: Planner, world_size: int) -> list[dict[str, Any]]:
    """Return what would save memory, best first.

    A change may lower another moment than the peak's, which does not fit either. Only the last
    entry shows that: all changes on as many ranks together.
    """
    trial = _Trial(planner, world_size)
    tried = list(trial.single_changes())
    least = trial.peak // _LEAST_SAVING
    saving = [remedy for remedy in tried if remedy.saves > least]
    saving.sort(key=lambda remedy: -remedy.saves)
    together: dict[str, Any] = {}
    for remedy in tried:
        if remedy.helps and remedy.world_size == world_size:
            together |= remedy.changes
    if len(together) > 1 and not any(remedy.fits for remedy in saving):
        combined = trial.of(f"together: {_in_words(together)}", world_size, together)
        if combined is not None:
            saving.append(combined)
    return [asdict(remedy) for remedy in saving]


class _Trial:
    """Plans changes of a config and compares them with the plan before."""

    def __init__(self, planner: Planner, world_size: int) -> None:
        self._planner = planner
        self._world_size = world_size
        before = planner.plan(world_size)["memory"]
        self.peak: int = before["peak"]["bytes"]
        self._too_large = {
            moment: size
            for moment, size in _sums(before).items()
            if size + before["reserve"] > before["limit"]
        }

    def single_changes(self) -> Iterator[Remedy]:
        """Try every change by itself."""
        world_size = self._world_size
        layout = self._planner.layout(world_size)
        cfg = self._planner.cfg
        candidates = [*_memory_changes(cfg, world_size), *_size_changes(cfg)]
        if samples_here(cfg):
            rows = rows_at_once(cfg, layout)
            candidates.append({"sampler.max_batch_size": max(rows // 2, 1)})
        if layout.on_gpu and not cfg.fsdp_cpu_offload:
            candidates.append({"fsdp_cpu_offload": True})
        for changes in candidates:
            remedy = self.of(_in_words(changes), world_size, changes)
            if remedy is not None:
                yield remedy
        remedy = self.of(f"--world-size {2 * world_size}", 2 * world_size, {})
        if remedy is not None:
            yield remedy

    def of(self, name: str, world_size: int, changes: dict[str, Any]) -> Remedy | None:
        """Plan a change; None if the config cannot be changed in this way."""
        try:
            memory = self._planner.plan(world_size, changes)["memory"]
        except (InputError, ValidationError):
            return None
        sums = _sums(memory)
        helps = any(sums[moment] < 0.995 * size for moment, size in self._too_large.items())
        return Remedy(
            change=name,
            changes=changes,
            world_size=world_size,
            peak=memory["peak"]["bytes"],
            moment=memory["peak"]["moment"],
            saves=self.peak - memory["peak"]["bytes"],
            helps=helps,
            fits=memory["fits"],
        )


def _sums(memory: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of each moment."""
    return {moment: sum(parts.values()) for moment, parts in memory["moments"].items()}


def _memory_changes(cfg: Settings, world_size: int) -> Iterator[dict[str, Any]]:
    """Yield switches that take memory for time."""
    if not cfg.enable_activation_checkpointing:
        yield {"enable_activation_checkpointing": True}
    if not cfg.reduce_every_microbatch:
        yield {"reduce_every_microbatch": True}
    if not cfg.fsdp_reshard_after_forward and world_size > 1:
        yield {"fsdp_reshard_after_forward": True}
    if cfg.data_parallel_replicate_size > 1:
        yield {"data_parallel_replicate_size": 1}
    if "8bit" not in cfg.optimizer["_component_"]:
        learning_rate = float(cfg.optimizer["lr"])
        yield {"optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": learning_rate}}


def _size_changes(cfg: Settings) -> Iterator[dict[str, Any]]:
    """Yield smaller parts of the work."""
    if (cfg.head_chunk_size or rows_per_chunk(1, cfg.device)) > _ROWS_OF_A_SMALL_CHUNK:
        yield {"head_chunk_size": _ROWS_OF_A_SMALL_CHUNK}
    yield {"context_parallel_size": 2 * cfg.context_parallel_size}
    tokens, length = cfg.packing.tokens_per_microbatch, cfg.packing.bin_length
    halves = {"packing.tokens_per_microbatch": tokens // 2}
    if length is not None and length >= tokens:
        halves["packing.bin_length"] = length // 2
    yield halves


def _in_words(changes: dict[str, Any]) -> str:
    """Return the overrides of a command line that make the changes."""
    words = []
    for key, value in changes.items():
        if isinstance(value, dict):
            value = value["_component_"]
        text = str(value).lower() if isinstance(value, bool) else value
        words.append(f"{key}={text}")
    return " ".join(words)
