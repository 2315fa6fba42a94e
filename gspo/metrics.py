"""Metrics that any split over ranks and microbatches adds up to the same number.

A value carries how it is put together: :class:`Mean`, :class:`Sum`, :class:`Max`, :class:`Min` or
:class:`Time`. Adding two is ``+``; :class:`StepMetrics` collects those of an optimizer step and
reduces them over the ranks. :data:`METRICS` describes what a run logs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from gspo.types import PackedBatch

Number = Tensor | float


@dataclass(frozen=True, slots=True)
class Metric:
    """A value with its weight, tensors of one element or floats; the subclass is the reduction."""

    value: Number
    weight: Number = 1.0

    def __add__(self, other: Self) -> Self:
        """Put two parts on one rank together."""
        value = self.value + other.value
        weight = self.weight + other.weight
        return type(self)(value, weight)

    def over_ranks(self, other: Self) -> Self:
        """Put the parts of two ranks together."""
        return self + other

    def number(self) -> float:
        """Return the metric as a number."""
        return float(self.value)

    @property
    def on_device(self) -> bool:
        """Whether reading the number may wait for a device."""
        return isinstance(self.value, Tensor) or isinstance(self.weight, Tensor)


class Mean(Metric):
    """A sum of values with the sum of their weights; NaN if nothing was counted."""

    __slots__ = ()

    def number(self) -> float:
        """Return the value divided by the weight."""
        weight = float(self.weight)
        return float(self.value) / weight if weight else math.nan


class Sum(Metric):
    """A count or an amount; the weight has no meaning."""

    __slots__ = ()


class Max(Metric):
    """The largest value; the weight has no meaning."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        """Take the larger value."""
        value: Number
        if isinstance(self.value, Tensor) and isinstance(other.value, Tensor):
            value = torch.maximum(self.value, other.value)
        else:
            value = max(float(self.value), float(other.value))
        return type(self)(value, self.weight)


class Min(Metric):
    """The smallest value; the weight has no meaning."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        """Take the smaller value."""
        value: Number
        if isinstance(self.value, Tensor) and isinstance(other.value, Tensor):
            value = torch.minimum(self.value, other.value)
        else:
            value = min(float(self.value), float(other.value))
        return type(self)(value, self.weight)


class Time(Metric):
    """Seconds: they add up on a rank, and a step takes as long as its slowest rank."""

    __slots__ = ()

    def over_ranks(self, other: Self) -> Self:
        """Take the longer time."""
        seconds = max(float(self.value), float(other.value))
        return type(self)(seconds, self.weight)


Metrics = dict[str, Metric]


class NotFinite(NamedTuple):
    """Documents that left the objective because a value of theirs was not finite."""

    documents: Number
    tokens: Number  # their labelled tokens

    def plus(self, other: NotFinite) -> NotFinite:
        """Add the counts of another part."""
        documents = self.documents + other.documents
        tokens = self.tokens + other.tokens
        return NotFinite(documents, tokens)


@dataclass(frozen=True, slots=True)
class Description:
    """A metric told: per what it is, its unit, and what it shows with its healthy range."""

    per: str
    unit: str
    shows: str = ""


# What a run writes by name. A name that starts with "_" feeds a derived metric and is not written.
# ``eval/pass@k`` has its k in the name, and ``reward/NAME`` its reward: they cannot stand here.
METRICS: dict[str, Description] = {
    "loss": Description("step", "", "the objective, with its penalties"),
    "grad_norm": Description("step", "", "norm of the gradient before it is clipped"),
    "lr": Description("step", "", "learning rate of the step"),
    "ratio/mean": Description("ratio", "", "importance ratio; near 1"),
    "ratio/max": Description("ratio", "", "largest ratio"),
    "ratio/min": Description("ratio", "", "smallest ratio"),
    "ratio/ess": Description("ratio", "share", "effective sample size; min_ess bounds it"),
    "bounded_documents": Description("step", "documents", "had a ratio cut by log_ratio_bound; 0"),
    "kl_new_old": Description("document", "nats", "k3 estimate of the drift since sampling"),
    "kl_ref": Description("token", "nats", "to the reference policy, by kl_estimator"),
    "entropy": Description("token", "nats", "of the policy; a fall to 0 ends exploration"),
    "new_logps": Description("token", "nats", "of the weights that train"),
    "old_logps": Description("token", "nats", "of the weights that sampled"),
    "log_ratio/rms_token": Description("token", "nats", "root mean square of new - old"),
    "log_ratio/abs_document": Description("document", "nats", "absolute mean of new - old"),
    "mismatch/rms_token": Description("token", "nats", "trainer - sampler at the same weights"),
    "mismatch/abs_document": Description("document", "nats", "the same, of document means"),
    "correction/ratio_mean": Description("ratio", "", "importance weight before truncation"),
    "correction/ratio_max": Description("ratio", "", "the largest of them"),
    "correction/ratio_ess": Description("ratio", "share", "their effective sample size"),
    "correction/weight_mean": Description("ratio", "", "after truncation or masking"),
    "correction/weight_ess": Description("ratio", "share", "their effective sample size"),
    "correction/changed": Description("ratio", "share", "truncated or masked"),
    "clip/any_document": Description("document", "share", "has a ratio outside the clip range"),
    "clip/binding_document": Description("document", "share", "has a gradient stopped by the clip"),
    "clip/binding_document_to_64": Description("document of up to 64 tokens", "share"),
    "clip/binding_document_to_256": Description("document of 65 to 256 tokens", "share"),
    "clip/binding_document_to_1024": Description("document of 257 to 1,024 tokens", "share"),
    "clip/binding_document_longer": Description("longer document", "share"),
    "clip/any_token": Description("token", "share", "in a ratio outside the clip range"),
    "clip/binding_token": Description("token", "share", "its gradient is stopped by the clip"),
    "clip/low": Description("ratio", "share", "stopped at the lower end"),
    "clip/high": Description("ratio", "share", "stopped at the upper end"),
    "clip/at_zero_drift": Description(
        "document", "share", "outside though the policy has not moved"
    ),
    "reward/mean": Description("drawn document", "", "weighted sum of the rewards"),
    "reward/std": Description("drawn document", "", "its standard deviation"),
    "rewarded/truncated": Description("rewarded document", "share", "was cut by max_new_tokens"),
    "rewarded/repeats_prompt": Description(
        "rewarded document", "share", "has half of its prompt's runs of eight words"
    ),
    "rewarded/same_text": Description(
        "rewarded document", "share", "has the commonest text of several prompts"
    ),
    "solved": Description("prompt", "share", "has a completion that earns the full reward"),
    "reward_failures": Description("step", "calls", "raised, timed out, died or gave no number; 0"),
    "length/mean": Description("drawn document", "tokens", "of the completion"),
    "length/max": Description("drawn document", "tokens", "of the longest completion"),
    "length/truncated": Description("drawn document", "share", "ended by max_new_tokens"),
    "dead_groups": Description("group", "share", "equal rewards: nothing to learn from"),
    "staleness/mean": Description("document", "policy versions", "behind the weights that train"),
    "staleness/max": Description("document", "policy versions", "the oldest"),
    "documents": Description("step", "documents", "trained on"),
    "tokens": Description("step", "tokens", "labels trained on"),
    "packing_efficiency": Description("slot", "share", "holds a token"),
    "quarantined_documents": Description("step", "documents", "had a value that is not finite; 0"),
    "update/changed_fraction": Description("weight looked at", "share", "moved by the step"),
    "skipped_steps": Description("run", "steps", "had a gradient norm that is not finite; 0"),
    "eval/accuracy": Description("prompt", "share", "greedy completion earns the full reward"),
    "eval/sampled_accuracy": Description("drawn document", "share", "the same, of drawn ones"),
    "eval/reward": Description("prompt", "", "reward of the greedy completion"),
    "eval/reward_failures": Description("evaluation", "calls", "as reward_failures"),
    "time/sample": Description("step", "s", "in the sampler"),
    "time/score": Description("step", "s", "in the rewards"),
    "time/data_wait": Description("step", "s", "waiting for microbatches"),
    "time/update": Description("step", "s", "forward, backward and optimizer"),
    "time/sync": Description("step", "s", "weights to the sampler"),
    "time/step": Description("step", "s", "from log row to log row"),
    "tokens_per_second": Description("second", "tokens", "through the policy, prompts included"),
    "mfu": Description("step", "share", "of the bf16 peak during the update, on a known GPU"),
    "peak_memory_gib": Description("run", "GiB", "allocated on the device"),
    "reserved_memory_gib": Description("run", "GiB", "that the allocator took from the device"),
    "alloc_retries": Description("run", "count", "times it had to give memory back first"),
}


def as_metric(value: Any) -> Metric:
    """Return a metric; a plain ``(value, weight)``, as a user's loss may give, is a mean."""
    return value if isinstance(value, Metric) else Mean(*value)


def merge(parts: Iterable[Mapping[str, Any]]) -> Metrics:
    """Return the metrics of several parts on one rank as one."""
    merged: Metrics = {}
    for part in parts:
        for name, value in part.items():
            metric = as_metric(value)
            known = merged.get(name)
            merged[name] = metric if known is None else known + metric
    return merged


class StepMetrics:
    """The metrics of an optimizer step on this rank, which :meth:`reduce` puts together.

    Args:
        parts: metrics to begin with.

    After :meth:`reduce`, ``not_finite`` counts the documents over all ranks that were found not
    finite in the forward, and ``has_not_finite`` says whether there is one.
    """

    def __init__(self, parts: Iterable[Mapping[str, Any]] = ()) -> None:
        self._tensors: list[tuple[str, Metric]] = []
        self._metrics: Metrics = {}
        self._not_finite: list[NotFinite] = []
        self.not_finite = NotFinite(0, 0)
        self.has_not_finite = False
        for part in parts:
            self.add(part)

    def add(self, metrics: Mapping[str, Any], not_finite: NotFinite | None = None) -> None:
        """Add a part. Tensors stay on their device until :meth:`reduce`: adding never waits for it.

        Args:
            metrics: by name, see :func:`as_metric`.
            not_finite: documents of the part that were found not finite.
        """
        if not_finite is not None:
            self._not_finite.append(not_finite)
        for name, value in metrics.items():
            metric = as_metric(value)
            if metric.on_device:
                self._tensors.append((name, metric))
            else:
                self._put(name, metric)

    def reduce(self) -> dict[str, float]:
        """Return numbers over all ranks, the same on each. Collective."""
        self._fetch()
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (self._metrics, self.not_finite))
        totals: Metrics = {}
        num_documents = num_tokens = 0
        for metrics, not_finite in ranks:
            num_documents += int(not_finite.documents)
            num_tokens += int(not_finite.tokens)
            for name, metric in metrics.items():
                known = totals.get(name)
                totals[name] = metric if known is None else known.over_ranks(metric)
        self.not_finite = NotFinite(num_documents, num_tokens)
        self.has_not_finite = num_documents > 0
        numbers = {name: totals[name].number() for name in sorted(totals)}
        return finalize(numbers)

    def alone(self) -> dict[str, float]:
        """Return the numbers of this rank by itself."""
        self._fetch()
        numbers = {name: metric.number() for name, metric in self._metrics.items()}
        return finalize(numbers)

    def _fetch(self) -> None:
        """Copy all tensors to the host in one transfer."""
        waiting: list[Number] = []
        for _, metric in self._tensors:
            waiting += [metric.value, metric.weight]
        for counts in self._not_finite:
            waiting += counts
        numbers = iter(_to_host(waiting))
        for name, metric in self._tensors:
            value = next(numbers)
            weight = next(numbers)
            self._put(name, type(metric)(value, weight))
        for _ in self._not_finite:
            documents = next(numbers)
            tokens = next(numbers)
            counts = NotFinite(documents, tokens)
            self.not_finite = self.not_finite.plus(counts)
        self._tensors.clear()
        self._not_finite.clear()

    def _put(self, name: str, metric: Metric) -> None:
        known = self._metrics.get(name)
        self._metrics[name] = metric if known is None else known + metric


def _to_host(values: list[Number]) -> list[float]:
    """Return all values as floats, the tensors among them fetched together."""
    tensors = [value.double() for value in values if isinstance(value, Tensor)]
    fetched: Iterator[float] = iter(())
    if tensors:
        fetched = iter(torch.stack(tensors).tolist())
    numbers = []
    for value in values:
        if isinstance(value, Tensor):
            numbers.append(next(fetched))
        else:
            numbers.append(float(value))
    return numbers


def finalize(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics with those that are derived from others."""
    derived = dict(metrics)
    if square := metrics.get("_ratio_sq"):
        mean = metrics["ratio/mean"]
        derived["ratio/ess"] = mean * mean / square  # share of the units
    for stage in ("ratio", "weight"):
        if square := metrics.get(f"_correction_{stage}_sq"):
            mean = metrics[f"correction/{stage}_mean"]
            derived[f"correction/{stage}_ess"] = mean * mean / square
    if "_mismatch_sq" in metrics:
        derived["mismatch/rms_token"] = math.sqrt(metrics["_mismatch_sq"])
    if "_reward_sq" in metrics:
        mean = metrics["reward/mean"]
        variance = metrics["_reward_sq"] - mean * mean  # ** raises where a product is infinite
        derived["reward/std"] = math.sqrt(max(variance, 0.0))
    if "_log_ratio_sq" in metrics:
        derived["log_ratio/rms_token"] = math.sqrt(metrics["_log_ratio_sq"])
    return derived


def public(values: Mapping[str, float]) -> dict[str, float]:
    """Return what is written: finite numbers that are no ingredients of derived metrics."""
    shown = {}
    for name, value in values.items():
        if not name.startswith("_") and math.isfinite(value):
            shown[name] = value
    return shown


def batch_metrics(batch: PackedBatch, version: int) -> Metrics:
    """Count a batch and its staleness.

    Args:
        batch: about to be trained on.
        version: of the weights that it trains.
    """
    is_sampled = batch.label_counts > 0
    behind = torch.where(is_sampled, version - batch.policy_version, 0)
    num_slots = (batch.document_index != batch.padding_document).sum()
    return {
        "documents": Sum(is_sampled.sum()),
        "tokens": Sum(batch.label_counts.sum()),
        "_slots": Sum(num_slots),
        "staleness/mean": Mean(behind.sum(), is_sampled.sum()),
        "staleness/max": Max(behind.max()),
    }
