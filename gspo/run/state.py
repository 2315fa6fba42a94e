"""Every counter of a run, in one place."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from gspo.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TrainState:
    """How far a run has come. Steps are numbered from 1, here and in all that a run writes."""

    step: int = 0  # optimizer steps done
    version: int = 0  # of the weights that the sampler holds: the step that they are of
    num_skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    num_spoiled_dumps: int = 0  # dumps of steps with a document that is not finite
    evaluated_at: int = -1  # step of the last evaluation
    has_ended: bool = False  # no optimizer step follows
    accuracy_before: float | None = None  # held-out, of the weights that the run began with
    accuracy_after: float | None = None  # of the last evaluation

    def finish_step(self, moved: bool, grad_norm: float, *, max_skipped: int) -> None:
        """Count an optimizer step.

        Args:
            moved: the weights have moved; False for a step that was skipped.
            grad_norm: of the step.
            max_skipped: steps in a row that may be skipped.

        Raises:
            InputError: More were skipped.
        """
        self.step += 1
        if moved:
            self.skipped_in_a_row = 0
            return
        self.num_skipped += 1
        self.skipped_in_a_row += 1
        logger.warning("Step %d is skipped: its gradient norm is %s.", self.step, grad_norm)
        if self.skipped_in_a_row > max_skipped:
            raise InputError(
                "max_skipped_steps",
                max_skipped,
                f"is exceeded: {self.skipped_in_a_row} steps in a row had a gradient norm that is "
                f"not finite ({grad_norm})",
                "lower optimizer.lr, set clip_grad_norm, or look into the quarantine files in "
                "output_dir for the documents that cause it",
            )

    def keep_evaluation(self, values: dict[str, float]) -> None:
        """Remember what an evaluation found, for the summary."""
        accuracy = values.get("eval/accuracy")
        if self.evaluated_at < 0:
            self.accuracy_before = accuracy
        self.accuracy_after = accuracy
        self.evaluated_at = self.step
