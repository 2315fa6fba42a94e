"""Metric sums that any sharding adds up to the same number, and where they are written.

A metric travels as ``(value, weight)``. Means add both and divide once, after the ranks have met; maxima and minima
ignore the weight; counts keep the value alone. :data:`METRICS` declares which is which, the unit, and what is counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gspo.types import PackedBatch

Pair = tuple[float, float]

# name -> (how ranks and microbatches are put together, per what, unit). A name that starts with "_" feeds a derived
# metric and is not written. ``eval/pass@k``, a mean per prompt, has its k in the name and cannot stand here.
METRICS: dict[str, tuple[str, str, str]] = {
    "loss": ("sum", "step", ""),
    "ratio/mean": ("mean", "unit of the ratio", ""),
    "_ratio_sq": ("mean", "unit of the ratio", ""),
    "ratio/max": ("max", "unit of the ratio", ""),
    "ratio/min": ("min", "unit of the ratio", ""),
    "kl_new_old": ("mean", "document", "nats"),
    "kl_ref": ("mean", "token", "nats"),
    "entropy": ("mean", "token", "nats"),
    "new_logps": ("mean", "token", "nats"),
    "old_logps": ("mean", "token", "nats"),
    "_mismatch_sq": ("mean", "token", "nats^2"),
    "mismatch/abs_document": ("mean", "document", "nats"),
    "correction/ratio_mean": ("mean", "unit of the ratio", ""),
    "correction/ratio_max": ("max", "unit of the ratio", ""),
    "correction/weight_mean": ("mean", "unit of the ratio", ""),
    "_correction_ratio_sq": ("mean", "unit of the ratio", ""),
    "_correction_weight_sq": ("mean", "unit of the ratio", ""),
    "correction/changed": ("mean", "unit of the ratio", "share"),
    "_log_ratio_sq": ("mean", "token", "nats^2"),
    "log_ratio/abs_document": ("mean", "document", "nats"),
    "bounded_documents": ("sum", "step", "documents"),
    "clip/any_document": ("mean", "document", "share"),
    "clip/binding_document": ("mean", "document", "share"),
    "clip/binding_document_to_64": ("mean", "document of up to 64 tokens", "share"),
    "clip/binding_document_to_256": ("mean", "document of 65 to 256 tokens", "share"),
    "clip/binding_document_to_1024": ("mean", "document of 257 to 1,024 tokens", "share"),
    "clip/binding_document_longer": ("mean", "longer document", "share"),
    "clip/any_token": ("mean", "token", "share"),
    "clip/binding_token": ("mean", "token", "share"),
    "clip/low": ("mean", "unit of the ratio", "share"),
    "clip/high": ("mean", "unit of the ratio", "share"),
    "reward/mean": ("mean", "drawn document", ""),
    "_reward_sq": ("mean", "drawn document", ""),
    "solved": ("mean", "prompt", "share"),
    "reward_failures": ("sum", "step", "calls"),
    "length/mean": ("mean", "drawn document", "tokens"),
    "length/max": ("max", "drawn document", "tokens"),
    "length/truncated": ("mean", "drawn document", "share"),
    "dead_groups": ("mean", "group", "share"),
    "staleness/mean": ("mean", "document", "policy versions"),
    "staleness/max": ("max", "document", "policy versions"),
    "documents": ("sum", "step", "documents"),
    "tokens": ("sum", "step", "tokens"),
    "packing_efficiency": ("mean", "place", "share"),
    "quarantined_documents": ("sum", "step", "documents"),
    "_late_documents": ("sum", "step", "documents"),
    "_late_tokens": ("sum", "step", "tokens"),
    "_places": ("sum", "step", "tokens"),
    "update/changed_fraction": ("mean", "weight looked at", "share"),
    "skipped_steps": ("max", "run", "steps"),
    "eval/accuracy": ("mean", "prompt", "share"),
    "eval/sampled_accuracy": ("mean", "drawn document", "share"),
    "eval/reward": ("mean", "prompt", ""),
    "eval/reward_failures": ("sum", "evaluation", "calls"),
    "time/sample": ("time", "step", "s"),
    "time/score": ("time", "step", "s"),
    "time/data_wait": ("time", "step", "s"),
    "time/update": ("time", "step", "s"),
    "time/sync": ("time", "step", "s"),
    "time/step": ("time", "step", "s"),
}


def combine(how: str, a: Pair, b: Pair) -> Pair:
    """Two pairs of one metric; ``how`` is the first entry of its line in :data:`METRICS`. Times add up on one rank."""
    if how in ("max", "min"):
        return (max if how == "max" else min)(a[0], b[0]), a[1]
    return a[0] + b[0], a[1] + b[1]


def merge_pairs(
    parts: Iterable[Mapping[str, tuple[Tensor, Tensor]]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """The metric pairs of several parts of a microbatch as one, on their device."""
    merged: dict[str, tuple[Tensor, Tensor]] = {}
    for part in parts:
        for name, (value, weight) in part.items():
            if name not in merged:
                merged[name] = value, weight
            elif METRICS.get(name, ("mean",))[0] in ("max", "min"):
                extreme = torch.maximum if METRICS[name][0] == "max" else torch.minimum
                merged[name] = extreme(merged[name][0], value), merged[name][1]
            else:
                merged[name] = merged[name][0] + value, merged[name][1] + weight
    return merged


class StepMetrics:
    """The metric pairs of one optimizer step on this rank; :meth:`reduce` makes them numbers over all ranks.

    Args:
        reward_names: rewards whose means arrive as ``reward/NAME``, the same on every rank.
    """

    def __init__(self, reward_names: Iterable[str] = ()) -> None:
        self._how = {name: spec[0] for name, spec in METRICS.items()}
        self._how |= {f"reward/{name}": "mean" for name in reward_names}
        self._tensors: list[tuple[str, Tensor, Tensor]] = []
        self._pairs: dict[str, Pair] = {}

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Tensors stay on their device until :meth:`reduce`, so that adding never waits for it."""
        for name, (value, weight) in metrics.items():
            if isinstance(value, Tensor):
                self._tensors.append((name, value, weight))
            else:
                self._add_pair(name, (float(value), float(weight)))

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Numbers over all ranks, by one packed all-gather. Every rank calls it and gets the same."""
        self._fetch()
        absent = (math.nan, math.nan)
        self._how = dict(
            sorted(self._how.items())
        )  # the ranks' columns must agree, in whatever order names arrived
        mine = torch.tensor(
            [self._pairs.get(name, absent) for name in self._how], dtype=torch.float64
        ).to(device)
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        totals: dict[str, Pair] = {}
        for rank in torch.stack(ranks).tolist():
            for (name, how), (value, weight) in zip(self._how.items(), rank, strict=True):
                if not math.isnan(weight):
                    # The step takes as long as its slowest rank.
                    how = "max" if how == "time" else how
                    totals[name] = (
                        combine(how, totals[name], (value, weight))
                        if name in totals
                        else (value, weight)
                    )
        return finalize({name: _number(self._how[name], *pair) for name, pair in totals.items()})

    def alone(self) -> dict[str, float]:
        """Numbers of this rank by itself; of one that is alone, what :meth:`reduce` gives."""
        self._fetch()
        return finalize(
            {name: _number(self._how[name], *pair) for name, pair in self._pairs.items()}
        )

    def _fetch(self) -> None:
        if self._tensors:
            values = torch.stack([x.double() for _, *pair in self._tensors for x in pair]).tolist()
            for (name, *_), value, weight in zip(
                self._tensors, values[::2], values[1::2], strict=True
            ):
                self._add_pair(name, (value, weight))
            self._tensors.clear()

    def _add_pair(self, name: str, pair: Pair) -> None:
        # A loss of the user's may bring metrics of its own: means, the same names on every rank.
        how = self._how.setdefault(name, "mean")
        self._pairs[name] = combine(how, self._pairs[name], pair) if name in self._pairs else pair


def _number(how: str, value: float, weight: float) -> float:
    if how == "mean":
        return value / weight if weight else math.nan
    return value


def finalize(metrics: dict[str, float]) -> dict[str, float]:
    """Derived metrics from their ingredients; names with a leading underscore go."""
    found = dict(metrics)
    if "_ratio_sq" in found and found["_ratio_sq"]:
        found["ratio/ess"] = found["ratio/mean"] ** 2 / found["_ratio_sq"]  # share of the units
    for before in ("ratio", "weight"):
        if square := found.get(f"_correction_{before}_sq"):
            found[f"correction/{before}_ess"] = found[f"correction/{before}_mean"] ** 2 / square
    if "_mismatch_sq" in found:
        found["mismatch/rms_token"] = math.sqrt(found["_mismatch_sq"])
    if "_reward_sq" in found:
        found["reward/std"] = math.sqrt(max(found["_reward_sq"] - found["reward/mean"] ** 2, 0.0))
    if "_log_ratio_sq" in found:
        found["log_ratio/rms_token"] = math.sqrt(found["_log_ratio_sq"])
    return found


def public(values: Mapping[str, float]) -> dict[str, float]:
    """What is written: no ingredients of derived metrics, nothing that is not a finite number."""
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and math.isfinite(value)
    }


def batch_pairs(batch: PackedBatch, version: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Counts and staleness of a batch that is about to train version ``version`` of the weights."""
    real = batch.label_counts > 0
    behind = torch.where(real, version - batch.policy_version, 0)
    one = torch.ones((), device=real.device)
    return {
        "documents": (real.sum(), one),
        "tokens": (batch.label_counts.sum(), one),
        "_places": ((batch.document_index != real.numel() - 1).sum(), one),
        "staleness/mean": (behind.sum(), real.sum()),
        "staleness/max": (behind.max(), one),
    }


def not_finite_documents(batch: PackedBatch, logps: Tensor) -> dict[int, dict[str, Any]]:
    """By document index, ids and values of the documents with a value that is not finite; ``logps`` is [T]."""
    names = ("ref_logps", "sampler_logps", "token_advantages")
    others = {name: x for name in names if (x := getattr(batch, name)) is not None}
    bad = ~sum(others.values(), logps + batch.old_logps).isfinite() & batch.loss_mask
    records = {}
    for d in batch.document_index[bad].unique().tolist():
        rows = (batch.document_index == d) & batch.loss_mask
        prompt_id, group_id = batch.ids[d]
        values = {
            "labels": batch.labels[rows],
            "logps": logps[rows],
            "old_logps": batch.old_logps[rows],
        }
        values |= {name: x[rows] for name, x in others.items()}
        ids = {
            "prompt_id": prompt_id,
            "group_id": group_id,
            "advantage": float(batch.advantages[d]),
        }
        records[d] = ids | {
            name: [repr(x) for x in tensor.tolist()] for name, tensor in values.items()
        }
    return records


_PEAK_BF16_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}  # dense, data sheets


def throughput(
    values: Mapping[str, float], num_parameters: int, device: torch.device
) -> dict[str, float]:
    """Tokens through the policy a second, prompts included, over all ranks; on a known GPU MFU (6 N) and memory."""
    rate = values["_places"] / values["time/step"]
    found = {"tokens_per_second": rate}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((flops for key, flops in _PEAK_BF16_FLOPS.items() if key in name), None)
        if peak is not None:
            found["mfu"] = 6 * num_parameters * rate / (peak * dist.get_world_size())
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def noise_floor(metrics: Mapping[str, float]) -> dict[str, float]:
    """What trainer and sampler disagree by, read off a step whose policy is still the one that sampled."""
    names = {
        "mismatch/rms_token": "log_ratio/rms_token",
        "mismatch/abs_document": "log_ratio/abs_document",
        "clip/at_zero_drift": "clip/any_document",
    }
    return {name: metrics[source] for name, source in names.items() if source in metrics}


def set_aside(path: Path) -> None:
    """Renames the file of an earlier run, ``metrics.jsonl`` to ``metrics.1.jsonl`` or the next free number."""
    number = 1
    while (kept := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    if path.exists():
        path.rename(kept)


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one JSON object as a line, with null for a number that JSON cannot hold."""
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")
