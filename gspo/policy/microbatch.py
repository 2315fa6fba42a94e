"""A packed batch on the device of one rank, with what is derived from its layout once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gspo.losses.inputs import LossInputs, Segments, find_segments
from gspo.parallel.context import ContextAxis
from gspo.parallel.split import Shard, split
from gspo.policy.mask import AttentionMask, document_mask
from gspo.types import Axis, PackedBatch, field_specs


@dataclass(frozen=True, slots=True)
class Microbatch:
    """This rank's part of a packed batch on the device."""

    shard: Shard  # where it lies in the whole, on the CPU
    batch: PackedBatch
    label_rows: Tensor  # [N] int64, slots with a label; one document's after another's if whole
    label_counts: list[int]  # [D] of them in each document, over all ranks
    counted: Tensor | None  # [D] bool, documents whose sums are added up here; None: all
    segments: Segments | None = None  # the whole's; their index is of the label rows here
    in_blocks: bool | None = None  # the form of masks, see document_mask
    masks: dict[int | None, AttentionMask] = field(default_factory=dict)  # by window, once made

    @classmethod
    def prepare(
        cls,
        packed: PackedBatch,
        device: torch.device,
        context: ContextAxis | None = None,
        *,
        in_blocks: bool | None = None,
    ) -> Microbatch:
        """Take this rank's part of a batch to ``device``.

        The label rows are looked up on the CPU, so that no kernel waits for them.

        Args:
            packed: the whole batch, on the CPU.
            device: this rank's.
            context: the ranks that share the batch.
            in_blocks: the form of the mask, see :func:`~gspo.policy.document_mask`.
        """
        shard = split(packed, context)
        rows = shard.part.loss_mask.nonzero().squeeze(-1)
        counted = shard.counted
        if counted is not None:
            counted = counted.to(device)
        return cls(
            shard=shard,
            batch=shard.part.to(device),
            label_rows=rows.to(device),
            label_counts=packed.label_counts.tolist(),
            counted=counted,
            segments=batch_segments(packed, shard.part, rows, device),
            in_blocks=in_blocks,
        )

    def mask(self, window: int | None = None) -> AttentionMask:
        """Return the mask of layers that attend to a window of their document; None: to all."""
        if window not in self.masks:
            device = self.label_rows.device
            self.masks[window] = document_mask(
                self.shard, device, window=window, in_blocks=self.in_blocks
            )
        return self.masks[window]

    def replace(self, **logps: Tensor) -> Microbatch:
        """Return a copy with other log-probabilities of this rank's slots, by field name."""
        changed: dict[str, Any] = dict(logps)
        return replace(self, batch=replace(self.batch, **changed))

    def whole(self, context: ContextAxis | None) -> PackedBatch:
        """Return the whole batch on the CPU, with the log-probabilities set since it was packed.

        Collective over the context axis.
        """
        collected: dict[str, Any] = {}
        for name, spec in field_specs(PackedBatch).items():
            values = getattr(self.batch, name)
            if spec.logps and values is not None:
                collected[name] = self.shard.collect(values, context).cpu()
        return replace(self.shard.whole, **collected)


def batch_segments(
    packed: PackedBatch, part: PackedBatch, rows: Tensor, device: torch.device
) -> Segments | None:
    """Return the segments of a batch, with the index of the label rows of a rank's part of it.

    Args:
        packed: the whole batch.
        part: a rank's part.
        rows: [N] slots of the part with a label.
        device: of the result.
    """
    if not packed.loss_mask.any():  # padding has none, whether the run cuts completions or not
        return Segments(*torch.zeros(3, 0, dtype=torch.int64, device=device))
    if packed.segment_index is None or part.segment_index is None:
        return None
    whole = find_segments(packed.segment_index, packed.document_index, packed.loss_mask)
    return Segments(
        index=part.segment_index[rows].to(device),
        document=whole.document.to(device),
        label_counts=whole.label_counts.to(device),
    )


def row_inputs(microbatch: Microbatch, context: ContextAxis | None) -> LossInputs:
    """Return what an objective gets of a microbatch: the rows that have a label, on this rank.

    Args:
        microbatch: any.
        context: the ranks that documents span; None where they are whole.
    """
    batch, rows = microbatch.batch, microbatch.label_rows
    values: dict[str, Any] = {}
    for name, spec in field_specs(LossInputs).items():
        column = getattr(batch, name, None)
        if column is None:
            continue
        if spec.axis == Axis.SLOT:
            column = column[rows]
        values[name] = column
    if context is not None:
        values["counted"] = microbatch.counted
        values["complete"] = context.complete
    # The rows have a label, each of them.
    values["loss_mask"] = torch.ones_like(rows, dtype=torch.bool)
    return LossInputs(**values, segments=microbatch.segments)
