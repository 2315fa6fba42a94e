"""What a step's numbers say about the run's settings: warnings that name the cure, each given once.

Not here: the metrics themselves (:mod:`gspo.metrics`, :mod:`gspo.objective_metrics`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

_SAMPLED = 65_536  # weights of a parameter's shard that are looked at
_INERT_STEPS = 50  # in a row without a ratio outside the band
FEW_CHANGED = (
    0.01  # share of weights that a step moves, below which most of its update is lost to rounding
)
NOISY_CLIP = 0.1  # clip fraction of a policy that has not moved


class UpdateAudit:
    """The share of weights that an optimizer step really changes, from 65,536 to twice as many of each large shard.

    bf16 has eight bits of precision: an update of less than a 512th of a weight is rounded away, and with a small
    learning rate that is most of them.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Remembers the weights before the step."""
        self._before = [_sampled(p).clone() for p in self._parameters]

    def end(self) -> tuple[int, int]:
        """How many weights have changed, and of how many, on this rank."""
        changed = [
            (_sampled(p) != old).sum()
            for p, old in zip(self._parameters, self._before, strict=True)
        ]
        total = sum(old.numel() for old in self._before)
        self._before = []
        return int(torch.stack(changed).sum()), total


def _sampled(parameter: Tensor) -> Tensor:
    data = parameter.detach()
    flat = (data.to_local() if isinstance(data, DTensor) else data).view(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)]


class Advisor:
    """Warns, once for each cause, where a run's own metrics show that a setting does not do what it is there for.

    Args:
        has_band: the objective clips, so that a ratio can be outside.
    """

    def __init__(self, *, has_band: bool = True) -> None:
        self._has_band = has_band
        self._given: set[str] = set()
        self._quiet_steps = 0

    def look(self, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step, on the rank that logs."""
        moved = values.get("update/changed_fraction")
        if (
            moved is not None
            and moved < FEW_CHANGED
            and values["lr"] > 0
            and 0 < values["grad_norm"] < math.inf
        ):
            self._warn(
                "update",
                "The step changed %.2g of the weights: the rest of the update was rounded away. Use "
                "torchao.optim.AdamW8bit with bf16_stochastic_round: true, or dtype: fp32, or raise optimizer.lr.",
                moved,
            )
        noise = values.get("clip/at_zero_drift", 0.0)
        if noise > NOISY_CLIP:
            self._warn(
                "noise",
                "%.2g of the documents are outside the band though the policy has not moved since they were sampled "
                "(log_ratio/abs_document %.1e): it is as narrow as the difference between sampler and trainer. "
                "Sample in the trainer's dtype, or widen loss.clip_low and loss.clip_high.",
                noise,
                values.get("log_ratio/abs_document", float("nan")),
            )
        outside = values.get("clip/any_document", 1.0)
        if not math.isnan(outside):  # as it is in a step without documents
            self._quiet_steps = 0 if outside > 0 else self._quiet_steps + 1
        if self._quiet_steps == _INERT_STEPS and self._has_band:
            self._warn(
                "inert",
                "No ratio has been outside the band for %d steps, so the clip does nothing (ratio/max %.6g): make more "
                "updates of each rollout (ppo_epochs, sync_every_steps), or narrow the band.",
                _INERT_STEPS,
                values.get("ratio/max", float("nan")),
            )

    def _warn(self, cause: str, message: str, *args: object) -> None:
        if cause not in self._given:
            self._given.add(cause)
            logger.warning(message, *args)
