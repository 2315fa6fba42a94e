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
_HELPING_SHARE = 0.995  # of a moment's bytes: what takes less than this takes less
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
    one_fits = any(remedy.fits for remedy in saving)
    if not one_fits:
        combined = trial.combine(tried)
        if combined is not None:
            saving.append(combined)
    return [asdict(remedy) for remedy in saving]


class _Trial:
    """Plans changes of a config and compares them with the plan before."""

    def __init__(self, planner: Planner, world_size: int) -> None:
        self._planner = planner
        self._world_size = world_size
        plan = planner.plan(world_size)
        memory = plan["memory"]
        self.peak: int = memory["peak"]["bytes"]
        self._too_large: dict[str, int] = {}  # bytes of the moments that do not fit
        available = memory["limit"] - memory["reserve"]
        for moment, size in _sums(memory).items():
            if size > available:
                self._too_large[moment] = size

    def single_changes(self) -> Iterator[Remedy]:
        """Try every change by itself."""
        world_size = self._world_size
        for changes in self._candidates():
            name = _in_words(changes)
            remedy = self._plan(name, world_size, changes)
            if remedy is not None:
                yield remedy
        twice = 2 * world_size
        remedy = self._plan(f"--world-size {twice}", twice, {})
        if remedy is not None:
            yield remedy

    def _candidates(self) -> Iterator[dict[str, Any]]:
        """Yield the changes of the config."""
        cfg = self._planner.cfg
        layout = self._planner.layout(self._world_size)
        yield from _memory_changes(cfg, self._world_size)
        yield from _size_changes(cfg)
        if samples_here(cfg):
            num_rows = rows_at_once(cfg, layout)
            half = max(num_rows // 2, 1)
            yield {"sampler.max_batch_size": half}
        if layout.on_gpu and not cfg.fsdp_cpu_offload:
            yield {"fsdp_cpu_offload": True}

    def combine(self, tried: list[Remedy]) -> Remedy | None:
        """Plan all changes that help on as many ranks; None if they are fewer than two."""
        changes: dict[str, Any] = {}
        for remedy in tried:
            if remedy.helps and remedy.world_size == self._world_size:
                changes |= remedy.changes
        if len(changes) < 2:
            return None
        name = f"together: {_in_words(changes)}"
        return self._plan(name, self._world_size, changes)

    def _plan(self, name: str, world_size: int, changes: dict[str, Any]) -> Remedy | None:
        """Plan a change; None if the config cannot be changed in this way."""
        try:
            plan = self._planner.plan(world_size, changes)
        except (InputError, ValidationError):
            return None
        memory = plan["memory"]
        peak = memory["peak"]
        num_bytes = peak["bytes"]
        sums = _sums(memory)
        return Remedy(
            change=name,
            changes=changes,
            world_size=world_size,
            peak=num_bytes,
            moment=peak["moment"],
            saves=self.peak - num_bytes,
            helps=self._helps(sums),
            fits=memory["fits"],
        )

    def _helps(self, sums: dict[str, int]) -> bool:
        """Whether a moment that does not fit takes less."""
        for moment, before in self._too_large.items():
            if sums[moment] < _HELPING_SHARE * before:
                return True
        return False


def _sums(memory: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of each moment."""
    sums = {}
    for moment, parts in memory["moments"].items():
        sums[moment] = sum(parts.values())
    return sums


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
    component = cfg.optimizer["_component_"]
    if "8bit" not in component:
        learning_rate = float(cfg.optimizer["lr"])
        optimizer = {"_component_": "torchao.optim.AdamW8bit", "lr": learning_rate}
        yield {"optimizer": optimizer}


def _size_changes(cfg: Settings) -> Iterator[dict[str, Any]]:
    """Yield smaller parts of the work."""
    num_rows = cfg.head_chunk_size or rows_per_chunk(1, cfg.device)
    if num_rows > _ROWS_OF_A_SMALL_CHUNK:
        yield {"head_chunk_size": _ROWS_OF_A_SMALL_CHUNK}
    yield {"context_parallel_size": 2 * cfg.context_parallel_size}
    tokens = cfg.packing.tokens_per_microbatch
    length = cfg.packing.bin_length
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
        elif isinstance(value, bool):
            value = str(value).lower()
        words.append(f"{key}={value}")
    return " ".join(words)
