"""Microbatches in, optimizer steps out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torchdata.nodes import BaseNode

from gspo.data.layout import pack_documents
from gspo.errors import NO_VALUE, InputError
from gspo.metrics import Metrics
from gspo.parallel.mesh import sum_over_ranks
from gspo.types import CAUSES, PackedBatch

logger = logging.getLogger(__name__)

WARN_EMPTY_ROUNDS = 10
# Of a step: a run that finds nothing to learn from ends instead of sampling for ever.
MAX_EMPTY_ROUNDS = 200
# A cause of the quarantine -> the key of what gave the value, what is wrong, and the remedy.
_LOST = {
    "reward": (
        "rewards",
        "gave no number that float32 holds",
        "correct the reward function",
    ),
    "logps": (
        "sampler",
        "gave log-probabilities that are not finite",
        "lower optimizer.lr or set clip_grad_norm, since the weights have diverged; before the "
        "first step, look at the checkpoint and the sampler",
    ),
    "advantage": (
        "advantages.estimator",
        "gave no advantage that float32 holds",
        "correct it, or the scale of the rewards",
    ),
}


@dataclass(frozen=True, slots=True)
class StepBatches:
    """One optimizer step's microbatches on this rank, and its totals over all ranks."""

    batches: list[PackedBatch]
    num_documents: int
    num_label_tokens: int

    @property
    def stats(self) -> list[Metrics]:
        """The stats of each microbatch."""
        return [batch.stats for batch in self.batches]


@dataclass(frozen=True, slots=True)
class _Round:
    """One microbatch on this rank, and counts over all ranks."""

    batch: PackedBatch
    num_documents: int
    num_label_tokens: int
    num_sources: int  # that may have more
    num_quarantined: int
    lost_to: str  # most frequent cause, where all that was drawn was quarantined; else empty

    @property
    def num_drawn(self) -> int:
        """Documents that count toward ``docs_per_step``."""
        return self.num_documents + self.num_quarantined


class FetchSteps(BaseNode[StepBatches]):
    """A node that draws microbatches until all ranks together have ``docs_per_step`` documents.

    All ranks take the same number of microbatches, so their collectives stay paired. A rank whose
    source has ended goes along with empty ones. So does one that is through with its rollout while
    another is not, over steps if need be: what it drew next would come from weights that the rest
    of the rollout is about to change.

    The count may overshoot by what the last round brings; by more than half of ``docs_per_step`` is
    logged, once.

    Args:
        source: this rank's microbatches.
        docs_per_step: documents over all ranks, dropped and quarantined ones included.
        context_size: ranks that train on the same microbatch, whose counts are all the same.
        empty_shape: bins, and their length, of the microbatches without a document that this node
            makes; None for one of the shortest bins.

    Raises:
        InputError: From ``next``, on every rank: all completions of a rollout were quarantined, or
            :data:`MAX_EMPTY_ROUNDS` in a row brought no document.
    """

    def __init__(
        self,
        source: BaseNode[PackedBatch],
        *,
        docs_per_step: int,
        context_size: int = 1,
        empty_shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.docs_per_step = docs_per_step
        self.context_size = context_size
        self.empty_shape = empty_shape
        self._warned = False

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on from a state."""
        super().reset(initial_state)
        self.source.reset(None if initial_state is None else initial_state["source"])
        # For another rank's rollout.
        self._waits = False if initial_state is None else initial_state["waits"]

    def get_state(self) -> dict[str, Any]:
        """Return the source's state, and whether this rank waits for the rollout of another."""
        return {"source": self.source.state_dict(), "waits": self._waits}

    def next(self) -> StepBatches:
        """Return the next step, or the rest when all sources have ended. Collective."""
        batches: list[PackedBatch] = []
        num_drawn = num_documents = num_label_tokens = num_empty_rounds = 0
        while num_drawn < self.docs_per_step or not num_documents:
            drawn = self._draw()
            if drawn.num_sources == 0:
                break
            _check_not_lost(drawn)
            num_empty_rounds = 0 if drawn.num_documents else num_empty_rounds + 1
            self._check_empty_rounds(num_empty_rounds)
            batches.append(drawn.batch)
            num_drawn += drawn.num_drawn
            num_documents += drawn.num_documents
            num_label_tokens += drawn.num_label_tokens
        if not num_documents:
            raise StopIteration
        self._check_overshoot(num_drawn)
        return StepBatches(batches, num_documents, num_label_tokens)

    def _draw(self) -> _Round:
        """Draw one microbatch on every rank that has one and waits for no other."""
        drawn = None if self._waits else next(self.source, None)
        batch = self._empty() if drawn is None else drawn
        may_have_more = self._waits or drawn is not None
        is_kept = drawn is not None and not drawn.lost_to
        counts = [
            batch.num_documents,
            batch.num_label_tokens,
            int(may_have_more),
            int(batch.continues),
            batch.num_quarantined,
            int(is_kept),
        ]
        for cause in CAUSES:
            num_lost = batch.num_quarantined if batch.lost_to == cause else 0
            counts.append(num_lost)
        totals = [total // self.context_size for total in sum_over_ranks(counts)]
        num_documents, num_label_tokens, num_sources, num_continuing = totals[:4]
        num_quarantined, num_kept, *lost = totals[4:]
        # Never all at once: a rank whose rollout continues draws.
        self._waits = num_continuing > 0 and not batch.continues
        lost_to = "" if num_kept or not any(lost) else CAUSES[lost.index(max(lost))]
        return _Round(batch, num_documents, num_label_tokens, num_sources, num_quarantined, lost_to)

    def _empty(self) -> PackedBatch:
        num_bins, bin_length = self.empty_shape or (1, None)
        return pack_documents([], bin_length, num_bins=num_bins)

    def _check_empty_rounds(self, num_rounds: int) -> None:
        if num_rounds == WARN_EMPTY_ROUNDS and dist.get_rank() == 0:
            logger.warning(
                "Waiting for groups whose rewards differ: %d microbatches had none.", num_rounds
            )
        if num_rounds == MAX_EMPTY_ROUNDS:
            raise InputError(
                "docs_per_step",
                self.docs_per_step,
                f"is out of reach, {MAX_EMPTY_ROUNDS} microbatches in a row brought no document",
                "with advantages.refill_dead_groups, no group has rewards that differ: set it to "
                "false, or give prompts of which the policy solves some",
            )

    def _check_overshoot(self, num_drawn: int) -> None:
        if self._warned or num_drawn <= 1.5 * self.docs_per_step:
            return
        self._warned = True
        if dist.get_rank() == 0:
            logger.warning(
                "docs_per_step: %d, but a step took %d documents, dropped ones included: it takes "
                "whole microbatches, one or more of every rank. Lower "
                "packing.tokens_per_microbatch, or raise docs_per_step.",
                self.docs_per_step,
                num_drawn,
            )


def _check_not_lost(drawn: _Round) -> None:
    if not drawn.lost_to:
        return
    key, must, remedy = _LOST[drawn.lost_to]
    raise InputError(
        key,
        NO_VALUE,
        f"{must}: all {drawn.num_quarantined} completions of a rollout were quarantined, most "
        f"often for this ({drawn.lost_to})",
        f"{remedy}. Their values are in quarantine_rank<r>.jsonl in output_dir",
    )
