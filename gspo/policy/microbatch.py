"""A packed batch on the device of one rank, with what is derived from its layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gspo.losses.inputs import LossInputs, Segments, find_segments
from gspo.parallel.context import ContextAxis, Shard, split
from gspo.policy.attention import AttentionMask, document_mask
from gspo.types import PackedBatch


@dataclass(frozen=True, slots=True)
class Microbatch:
    """This rank's part of a packed batch on the device, with what is derived from its layout once."""

    shard: Shard  # where it lies in the whole, on the CPU
    batch: PackedBatch
    label_rows: (
        Tensor  # [N] int64, places with a label; where documents are whole, one's after another's
    )
    label_counts: list[int]  # [D] of them in each document, over all ranks
    counted: Tensor | None  # [D] bool, documents whose sums are added up on this rank; None: all
    attention_mask: AttentionMask
    segments: Segments | None = None  # of the label rows here; those of the whole

    @classmethod
    def prepare(
        cls, packed: PackedBatch, device: torch.device, context: ContextAxis | None = None
    ) -> Microbatch:
        """Takes this rank's part of a batch to ``device``. The label rows are found before, so that no kernel waits."""
        shard = split(packed, context)
        rows = shard.part.loss_mask.nonzero().squeeze(-1)
        return cls(
            shard=shard,
            batch=shard.part.to(device),
            label_rows=rows.to(device),
            label_counts=packed.label_counts.tolist(),
            counted=None if shard.counted is None else shard.counted.to(device),
            attention_mask=document_mask(shard, device),
            segments=batch_segments(packed, shard.part, rows, device),
        )

    def whole(self, context: ContextAxis | None) -> PackedBatch:
        """The whole batch on the CPU, with the log-probabilities that were set since it was packed. Collective."""
        set_later = {
            name: getattr(self.batch, name) for name in ("old_logps", "ref_logps", "sampler_logps")
        }
        found: dict[str, Any] = {
            name: self.shard.collect(values, context).cpu()
            for name, values in set_later.items()
            if values is not None
        }
        return replace(self.shard.whole, **found)


def batch_segments(
    packed: PackedBatch, part: PackedBatch, rows: Tensor, device: torch.device
) -> Segments | None:
    """The segments of a batch, with the index of the label rows of a rank's part of it."""
    if (
        not packed.loss_mask.any()
    ):  # padding, which has none whether the run cuts completions or not
        return Segments(*torch.zeros(3, 0, dtype=torch.int64, device=device))
    if packed.segment_index is None or part.segment_index is None:
        return None
    whole = find_segments(packed.segment_index, packed.document_index, packed.loss_mask)
    return Segments(
        *(x.to(device) for x in (part.segment_index[rows], whole.document, whole.label_counts))
    )


def row_inputs(microbatch: Microbatch, context: ContextAxis | None) -> LossInputs:
    """What an objective gets of a microbatch: the rows that have a label, on this rank."""
    batch, rows = microbatch.batch, microbatch.label_rows
    spanning: dict[str, Any] = (
        {} if context is None else {"counted": microbatch.counted, "complete": context.complete}
    )
    own = batch.token_advantages
    return LossInputs(
        document_index=batch.document_index[rows],
        loss_mask=torch.ones_like(rows, dtype=torch.bool),
        old_logps=batch.old_logps[rows],
        advantages=batch.advantages,
        label_counts=batch.label_counts,
        ref_logps=None if batch.ref_logps is None else batch.ref_logps[rows],
        sampler_logps=None if batch.sampler_logps is None else batch.sampler_logps[rows],
        segments=microbatch.segments,
        token_advantages=None if own is None else own[rows],
        **spanning,
    )


def _part(inputs: LossInputs, label_counts: list[int], first: int, last: int) -> LossInputs:
    """Documents ``first`` to ``last - 1`` alone; their rows stand one after another."""
    if (first, last) == (0, len(label_counts)):
        return inputs
    start = sum(label_counts[:first])
    rows = slice(start, start + sum(label_counts[first:last]))
    given = inputs.token_advantages
    return LossInputs(
        document_index=inputs.document_index[rows] - first,
        loss_mask=inputs.loss_mask[rows],
        old_logps=inputs.old_logps[rows],
        advantages=inputs.advantages[first:last],
        label_counts=inputs.label_counts[first:last],
        ref_logps=None if inputs.ref_logps is None else inputs.ref_logps[rows],
        sampler_logps=None if inputs.sampler_logps is None else inputs.sampler_logps[rows],
        segments=None
        if inputs.segments is None
        else _part_segments(inputs.segments, rows, first, last),
        token_advantages=None if given is None else given[rows],
    )


def _part_segments(segments: Segments, rows: slice, first: int, last: int) -> Segments:
    """Those of documents ``first`` to ``last - 1``; the others keep their numbers and are without labels."""
    inside = (segments.document >= first) & (segments.document < last)
    document = torch.where(inside, segments.document - first, 0)
    return Segments(segments.index[rows], document, torch.where(inside, segments.label_counts, 0))
