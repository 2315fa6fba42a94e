"""Warnings about a run's settings, read off a step's numbers; each names the cure, once.

Not here: the metrics themselves (:mod:`gspo.metrics`, :mod:`gspo.losses.accounting`).
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtune import utils

from gspo.losses.inputs import traits_of
from gspo.losses.presets import LENGTHS, effective_weights
from gspo.metrics import Mean, Metrics
from gspo.types import PackedBatch

logger = logging.getLogger(__name__)

# Share of weights that a step moves, below which most of its update is lost to rounding.
FEW_CHANGED = 0.01
NOISY_CLIP = 0.1  # clip fraction of a policy that has not moved
_LOOKED_AT = 65_536  # weights of a parameter's shard
_INERT_STEPS = 50  # in a row without a ratio outside the clip range
_RECENT_STEPS = 40
_IDLE_STEPS = 20  # of the recent ones without a document
_RISE_STEPS = 8  # with rewards, over which a rise is more than noise
_MUCH_GAMED = 0.5  # of the rewarded documents
# What rewarded completions have in common that are paid for nothing.
_GAMED = {
    "rewarded/truncated": "were cut before they ended",
    "rewarded/repeats_prompt": "repeat their prompt",
    "rewarded/same_text": "are one text for several prompts",
}
# Metrics that are noise where the policy is still the one that sampled, and where they are read.
_NOISE_FLOOR = {
    "mismatch/rms_token": "log_ratio/rms_token",
    "mismatch/abs_document": "log_ratio/abs_document",
    "clip/at_zero_drift": "clip/any_document",
}


class UpdateAudit:
    """A count of the weights that an optimizer step really changes: ``with audit:`` around it.

    It looks at 65,536 to twice as many of each large shard. bf16 has eight bits of precision: an
    update of less than a 512th of a weight is rounded away, and with a small learning rate that is
    most of them.

    Args:
        parameters: those without a gradient are left out.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._before: list[Tensor] = []
        self._metrics: Metrics = {}

    def __enter__(self) -> UpdateAudit:
        """Remember the weights before the step."""
        self._metrics = {}
        self._before = [_looked_at(parameter).clone() for parameter in self._parameters]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Compare the weights with those before, unless the step failed."""
        if error is None:
            self._metrics = {"update/changed_fraction": self._compare()}
        self._before = []

    def metrics(self) -> Metrics:
        """Return the share of weights on this rank that the last step changed."""
        return dict(self._metrics)

    def _compare(self) -> Mean:
        changed = []
        num_looked_at = 0
        for parameter, before in zip(self._parameters, self._before, strict=True):
            changed.append((_looked_at(parameter) != before).sum())
            num_looked_at += before.numel()
        return Mean(int(torch.stack(changed).sum()), num_looked_at)


def _looked_at(parameter: Tensor) -> Tensor:
    data = parameter.detach()
    local = data.to_local() if isinstance(data, DTensor) else data
    flat = local.view(-1)
    stride = max(1, flat.numel() // _LOOKED_AT)
    return flat[::stride]


class Advisor:
    """A reader of a run's own metrics that warns where a setting does not do what it is there for.

    It warns once for each cause; of quarantined documents again whenever they have doubled.

    Args:
        loss: what it declares about a clip range decides whether a silent clip is a cause.
        warns: whether this rank logs the warnings; one rank of a run does.
    """

    def __init__(self, loss: Any, *, warns: bool = True) -> None:
        self._has_clip_range = traits_of(loss).has_clip_range
        self._warns = warns
        self._causes: set[str] = set()  # already warned of
        self._quiet_steps = 0
        self._idle: deque[bool] = deque(maxlen=_RECENT_STEPS)  # a recent step had no document
        self._rewards: deque[float] = deque(maxlen=_RECENT_STEPS)  # of recent steps with rewards
        self._num_quarantined = 0
        self._told_quarantined = 0  # when it was last logged

    def look(self, values: Mapping[str, float], *, fresh: bool) -> dict[str, float]:
        """Take the metrics of a step and return those that are derived from them.

        Args:
            values: over all ranks.
            fresh: the policy is still the one that sampled, and old_logps come from the sampler:
                what differs is what trainer and sampler disagree by.
        """
        derived = _noise_floor(values) if fresh else {}
        if self._warns:
            values = {**values, **derived}
            self._look_at_update(values)
            self._look_at_noise(values)
            self._look_at_clip(values)
            self._look_at_documents(values)
            self._look_at_rewards(values)
            self._look_at_rewarded(values)
            self._look_at_quarantine(values)
        return derived

    def look_for_older(self, batch: PackedBatch, version: int) -> None:
        """Take a batch whose ``old_logps`` are computed with the sampler's weights.

        Args:
            batch: its documents may come from older weights.
            version: of the sampler's weights, in optimizer steps.
        """
        if not self._warns or not batch.ids:
            return
        sampled = batch.policy_version[batch.label_counts > 0]
        oldest = int(sampled.amin())
        if oldest < version:
            self._warn(
                "older",
                "old_logps: recompute takes the weights that the sampler has, of step %d, and "
                "documents came from those of step %d. What lies between is in mismatch/*, and in "
                "no ratio: set loss.correction to weigh it, or sync when a rollout is used up "
                "(sync_every_steps) and do without prefetch.",
                version,
                oldest,
            )

    def _look_at_update(self, values: Mapping[str, float]) -> None:
        changed = values.get("update/changed_fraction", 1.0)
        if changed < FEW_CHANGED and values["lr"] > 0 and 0 < values["grad_norm"] < math.inf:
            self._warn(
                "update",
                "The step changed %.2g of the weights: the rest of the update was rounded away. "
                "Use torchao.optim.AdamW8bit with bf16_stochastic_round: true, or dtype: fp32, or "
                "raise optimizer.lr.",
                changed,
            )

    def _look_at_noise(self, values: Mapping[str, float]) -> None:
        noise = values.get("clip/at_zero_drift", 0.0)
        if noise > NOISY_CLIP:
            self._warn(
                "noise",
                "%.2g of the documents are outside the clip range though the policy has not moved "
                "since they were sampled (log_ratio/abs_document %.1e): it is as narrow as the "
                "difference between sampler and trainer. Sample in the trainer's dtype, or widen "
                "loss.clip_low and loss.clip_high.",
                noise,
                values.get("log_ratio/abs_document", math.nan),
            )

    def _look_at_clip(self, values: Mapping[str, float]) -> None:
        outside = values.get("clip/any_document", 1.0)
        if not math.isnan(outside):  # as it is in a step without documents
            self._quiet_steps = 0 if outside > 0 else self._quiet_steps + 1
        if self._quiet_steps == _INERT_STEPS and self._has_clip_range:
            self._warn(
                "inert",
                "No ratio has been outside the clip range for %d steps, so the clip does nothing "
                "(ratio/max %.6g): make more updates of each rollout (ppo_epochs, "
                "sync_every_steps), or narrow the clip range.",
                _INERT_STEPS,
                values.get("ratio/max", math.nan),
            )

    def _look_at_documents(self, values: Mapping[str, float]) -> None:
        self._idle.append(values.get("documents") == 0)
        num_idle = sum(self._idle)
        if num_idle >= _IDLE_STEPS:
            self._warn(
                "idle",
                "%d of the last %d steps trained on no document: the run learns nothing from them. "
                "dead_groups is %.2g, quarantined_documents %.2g. See that the reward tells the "
                "completions of a prompt apart (completions.jsonl), raise group_size, or give "
                "prompts of which the policy solves some.",
                num_idle,
                len(self._idle),
                values.get("dead_groups", math.nan),
                values.get("quarantined_documents", 0.0),
            )

    def _look_at_rewards(self, values: Mapping[str, float]) -> None:
        reward = values.get("reward/mean", math.nan)
        if math.isnan(reward):  # a step on a rollout of before
            return
        self._rewards.append(reward)
        if len(self._rewards) == _RECENT_STEPS and len(set(self._rewards)) == 1:
            self._warn(
                "reward",
                "reward/mean has been %g in each of the last %d steps with rewards: there is "
                "nothing to learn from. Read completions.jsonl: does the reward give what you "
                "would give? Look at solved (prompts too hard or too easy), length/truncated "
                "(sampling.max_new_tokens) and reward_failures.",
                reward,
                _RECENT_STEPS,
            )

    def _look_at_rewarded(self, values: Mapping[str, float]) -> None:
        """Warn where most of what is rewarded looks like nothing, while the reward has risen."""
        reward = values.get("reward/mean", math.nan)
        if math.isnan(reward) or len(self._rewards) < _RISE_STEPS or reward <= self._rewards[0]:
            return
        for name, shows in _GAMED.items():
            share = values.get(name, 0.0)
            if share > _MUCH_GAMED:
                self._warn(
                    name,
                    "reward/mean has risen from %.3g to %.3g, and %.0f %% of the rewarded "
                    "completions %s (%s). Read completions.jsonl: does the reward pay for nothing? "
                    "docs/reward_hacking.md tells what to change.",
                    self._rewards[0],
                    reward,
                    100 * share,
                    shows,
                    name,
                )

    def _look_at_quarantine(self, values: Mapping[str, float]) -> None:
        """Log the first quarantined documents, and then whenever there are twice as many."""
        self._num_quarantined += int(values.get("quarantined_documents", 0))
        total = self._num_quarantined
        if total and total >= 2 * self._told_quarantined:
            self._told_quarantined = total
            logger.warning(
                "Quarantined documents so far: %d, which had a value that is not finite and are in "
                "no loss. quarantine_rank<r>.jsonl in output_dir says which they are and why.",
                total,
            )

    def _warn(self, cause: str, message: str, *args: object) -> None:
        if cause not in self._causes:
            self._causes.add(cause)
            logger.warning(message, *args)


def _noise_floor(values: Mapping[str, float]) -> dict[str, float]:
    """Return what trainer and sampler disagree by, where the policy is the one that sampled."""
    return {name: values[source] for name, source in _NOISE_FLOOR.items() if source in values}


def log_document_weights(loss: Any) -> None:
    """Log on the first rank what documents of :data:`gspo.losses.presets.LENGTHS` tokens weigh."""
    if dist.get_rank() != 0:
        return
    log = utils.get_logger("INFO")
    lengths = ", ".join(map(str, LENGTHS))
    try:
        weights = effective_weights(loss)
    except Exception as error:  # a loss of the user's, which may need more than it is given here
        log.info("What documents of %s tokens weigh could not be found: %r", lengths, error)
        return
    shown = ", ".join(f"{weight:.3g}" for weight in weights)
    log.info("In a step of documents of %s tokens, each weighs %s.", lengths, shown)
