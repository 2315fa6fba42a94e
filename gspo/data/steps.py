"""Microbatches in, optimizer steps out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torchdata.nodes import BaseNode

from gspo.data.layout import pack_documents
from gspo.errors import InputError
from gspo.parallel.mesh import sum_over_ranks
from gspo.types import PackedBatch

logger = logging.getLogger(__name__)


WARN_EMPTY_ROUNDS = 10


MAX_EMPTY_ROUNDS = (
    200  # of a step: a run that finds nothing to learn from ends instead of sampling for ever
)


@dataclass(frozen=True, slots=True)
class StepBatches:
    """The microbatches of one optimizer step on this rank, and the totals over all ranks and microbatches."""

    batches: list[PackedBatch]
    num_documents: int
    num_label_tokens: int


class FetchSteps(BaseNode[StepBatches]):
    """Microbatches in, optimizer steps out: every rank draws until their global document count is ``docs_per_step``.

    All ranks take the same number of microbatches, so their collectives stay paired. A rank whose source has ended goes
    along with empty ones. So does one that is through with its rollout while another is not, over steps if need be:
    what it drew next would come from weights that the rest of the rollout is about to change.

    The count may overshoot by what the last round brings; by more than half of ``docs_per_step`` is logged, once.

    Args:
        source: this rank's microbatches.
        docs_per_step: documents over all ranks, dropped ones included.
        device: of the counts that are added up over the ranks.
        context_size: ranks that train on the same microbatch, whose counts are all the same.

    Raises:
        InputError: from ``next``, on every rank, after :data:`MAX_EMPTY_ROUNDS` in a row without a document.
    """

    def __init__(
        self,
        source: BaseNode[PackedBatch],
        *,
        docs_per_step: int,
        device: torch.device,
        context_size: int = 1,
    ) -> None:
        super().__init__()
        self.source, self.docs_per_step, self.device, self.context_size = (
            source,
            docs_per_step,
            device,
            context_size,
        )
        self._warned = False

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        """Start over, or go on from a state."""
        super().reset(initial_state)
        self.source.reset(None if initial_state is None else initial_state["source"])
        self._waits = (
            False if initial_state is None else initial_state["waits"]
        )  # for another rank's rollout

    def get_state(self) -> dict[str, Any]:
        """The source's state, and whether this rank waits for the rollout of another."""
        return {"source": self.source.state_dict(), "waits": self._waits}

    def next(self) -> StepBatches:
        """The next step, or what is left of one when all sources have ended. Collective."""
        batches: list[PackedBatch] = []
        num_documents = num_label_tokens = num_empty_rounds = 0
        while num_documents < self.docs_per_step:
            batch, documents, tokens, sources = self._draw()
            if not sources:
                break
            num_empty_rounds = 0 if documents else num_empty_rounds + 1
            self._check_empty_rounds(num_empty_rounds)
            batches.append(batch)
            num_documents += documents
            num_label_tokens += tokens
        if not num_documents:
            raise StopIteration
        self._check_overshoot(num_documents)
        return StepBatches(batches, num_documents, num_label_tokens)

    def _draw(self) -> tuple[PackedBatch, int, int, int]:
        """One round: this rank's batch; over all ranks its documents, label tokens, and sources that may have more."""
        drawn = None if self._waits else next(self.source, None)
        batch = pack_documents([]) if drawn is None else drawn
        present = self._waits or drawn is not None
        counts = [
            batch.num_documents,
            batch.num_label_tokens,
            int(present),
            int(batch.rollout_continues),
        ]
        documents, tokens, sources, continuing = (
            x // self.context_size for x in sum_over_ranks(counts, self.device)
        )
        # Never all at once: a rank whose rollout continues draws.
        self._waits = continuing > 0 and not batch.rollout_continues
        return batch, documents, tokens, sources

    def _check_empty_rounds(self, num_rounds: int) -> None:
        if num_rounds == WARN_EMPTY_ROUNDS and dist.get_rank() == 0:
            logger.warning(
                "Waiting for groups whose rewards differ: %d microbatches had none.", num_rounds
            )
        if num_rounds == MAX_EMPTY_ROUNDS:
            raise InputError(
                f"docs_per_step: {self.docs_per_step} is out of reach, {MAX_EMPTY_ROUNDS} microbatches in a row "
                "brought no document. With advantages.refill_dead_groups, no group has rewards that differ: set it to "
                "false, or give prompts of which the policy solves some."
            )

    def _check_overshoot(self, num_documents: int) -> None:
        if self._warned or num_documents <= 1.5 * self.docs_per_step:
            return
        self._warned = True
        if dist.get_rank() == 0:
            logger.warning(
                "docs_per_step: %d, but a step took %d documents, dropped ones included: it takes whole microbatches, "
                "one or more of every rank. Lower packing.tokens_per_microbatch, or raise docs_per_step.",
                self.docs_per_step,
                num_documents,
            )
