"""Prompt, Completion, Group, GroupBatch and PackedBatch: shapes, units and axes, declared once.

Everything before :class:`PackedBatch` works on token ids and plain Python objects; everything after
it on tensors. This module imports torch for annotations only, so that reward workers start without
loading it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from gspo.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Prompt:
    """A task. ``id`` is stable over runs and leads back to its source, e.g. ``train.jsonl:17``."""

    id: str
    text: str
    tokens: list[int]
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn. ``temperature`` 0 is greedy decoding."""

    temperature: float = 1.0
    max_new_tokens: int = 256


@dataclass(slots=True)
class Completion:
    """A sampled answer to a prompt, with how it was sampled."""

    tokens: list[int]  # sampled ids, the stop token included when one was drawn
    logps: list[float]  # nats, one per token, under the distribution sampled from
    text: str  # decoded, without special tokens
    finish_reason: str  # "stop" or "length"
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    logps_of: str = "processed"  # "processed": at the temperature; "raw": at temperature 1
    policy_version: int = 0
    tokenizer: str = ""  # fingerprint
    rewards: dict[str, float] = field(default_factory=dict)  # by reward name, before weights
    reward: float = 0.0  # weighted sum
    advantage: float = 0.0
    segments: list[int] = field(default_factory=list)  # of each token, from 0; empty: not cut
    segment_advantages: list[float] = field(default_factory=list)  # empty: the completion's own


@dataclass(slots=True)
class Group:
    """A prompt and its completions, the unit over which advantages are taken."""

    id: int  # unique on its rank
    prompt: Prompt
    completions: list[Completion]


@dataclass(slots=True)
class GroupBatch:
    """The groups of one call of the sampler, on their way through scoring and advantages.

    ``dropped_documents`` and ``dropped_tokens`` count documents that were drawn, carry no gradient
    and were taken out before the update; they stay in the denominators. ``dead_groups`` are those
    whose rewards are equal, in ``groups`` or taken out. ``quarantined_documents`` were drawn too
    and are in no denominator.
    """

    groups: list[Group]
    stats: Metrics = field(default_factory=dict)
    dropped_documents: int = 0
    dropped_tokens: int = 0
    dead_groups: list[Group] = field(default_factory=list)
    quarantined_documents: int = 0
    lost_to: str = ""  # of a rollout quarantined as a whole: the most frequent of CAUSES


# A completion is quarantined for the first of these that is not finite.
CAUSES = ("reward", "logps", "advantage")


class Axis(StrEnum):
    """The things of which a tensor of a batch has one value each."""

    SLOT = "slots"  # a position in a bin
    DOCUMENT = "documents"
    SEGMENT = "segments"  # a part of a document: a turn, a reasoning step


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """The declaration of a batch's tensor; sharding, dumps, quarantine and replay follow it."""

    axis: Axis
    numbers: Axis | None = None  # the values are numbers of these, unique in the batch
    logps: bool = False  # nats, 0 outside loss_mask; the trainer may fill it in later


def _over(
    axis: Axis, *, numbers: Axis | None = None, logps: bool = False, default: Any = MISSING
) -> Any:
    return field(default=default, metadata={"spec": FieldSpec(axis, numbers, logps)})


@cache
def field_specs(cls: type) -> dict[str, FieldSpec]:
    """Return the declarations of a class's tensors by field name, in the order of the fields."""
    return {f.name: f.metadata["spec"] for f in fields(cls) if "spec" in f.metadata}


@dataclass(slots=True, kw_only=True)
class PackedBatch:
    """R bins of S slots, seen flat by the loss as T = R * S slots with D documents in them.

    A document of n tokens fills n - 1 slots: its last token is only ever a label. Documents of one
    group in a bin may share a prefix: the prompt without its last token stands before them once, as
    a document without labels, and each goes on from there. The sampled documents come first, then
    prefixes; the last is padding, there even when nothing is padded.

    A new field of a slot, a document or a segment is declared here and filled in
    :mod:`gspo.data.layout`; nothing else lists the fields.
    """

    num_bins: int  # R
    # [T] int64
    tokens: torch.Tensor = _over(Axis.SLOT)
    # [T] int64, the next token of the same document; 0 where there is none
    labels: torch.Tensor = _over(Axis.SLOT)
    # [T] int64, from 0 in each document, or from the end of its prefix
    positions: torch.Tensor = _over(Axis.SLOT)
    # [T] int64 in [0, D), D - 1 is padding
    document_index: torch.Tensor = _over(Axis.SLOT, numbers=Axis.DOCUMENT)
    # [T] bool, True where the label was sampled by the policy
    loss_mask: torch.Tensor = _over(Axis.SLOT)
    # [T] float32 nats, of the label under the distribution sampled from; 0 outside loss_mask
    old_logps: torch.Tensor = _over(Axis.SLOT, logps=True)
    # [D] float32
    advantages: torch.Tensor = _over(Axis.DOCUMENT)
    # [D] float32
    rewards: torch.Tensor = _over(Axis.DOCUMENT)
    # [D] int64, labelled tokens of each document
    label_counts: torch.Tensor = _over(Axis.DOCUMENT)
    # [D] int64
    policy_version: torch.Tensor = _over(Axis.DOCUMENT)
    # [D] float32, > 0 (1 for prefixes and padding)
    temperature: torch.Tensor = _over(Axis.DOCUMENT)
    num_documents: int  # in the step's denominators: those here and the dropped ones
    num_label_tokens: int  # the same in labelled tokens
    num_quarantined: int = 0  # documents drawn for the step that are in no denominator
    lost_to: str = ""  # see GroupBatch
    ids: list[tuple[str, int]] = field(default_factory=list)  # (prompt id, group id) of each
    stats: Metrics = field(default_factory=dict)  # of the groups behind this batch
    continues: bool = False  # more of the same call of the sampler waits on this rank
    # [D] int64, the document that each also sees, itself if none; None: no prefix
    prefix_index: torch.Tensor | None = _over(Axis.DOCUMENT, numbers=Axis.DOCUMENT, default=None)
    # [T] float32 nats, under the reference policy at the same temperature
    ref_logps: torch.Tensor | None = _over(Axis.SLOT, logps=True, default=None)
    # [T] float32 nats, of the sampler, where the trainer's own stand in old_logps
    sampler_logps: torch.Tensor | None = _over(Axis.SLOT, logps=True, default=None)
    # [T] int64 in [0, K), finer than a document
    segment_index: torch.Tensor | None = _over(Axis.SLOT, numbers=Axis.SEGMENT, default=None)
    # [K] float32, in place of advantages
    segment_advantages: torch.Tensor | None = _over(Axis.SEGMENT, default=None)

    @property
    def token_advantages(self) -> torch.Tensor | None:  # [T] float32
        """Advantages of the labelled tokens' segments; None where segments have none of their own.

        Values outside ``loss_mask`` mean nothing.
        """
        if self.segment_index is None or self.segment_advantages is None:
            return None
        return self.segment_advantages[self.segment_index.where(self.loss_mask, 0)]

    @property
    def bin_length(self) -> int:
        """S, slots in a bin."""
        return self.tokens.numel() // max(self.num_bins, 1)

    @property
    def padding_document(self) -> int:
        """The number of the document that padding belongs to."""
        return self.label_counts.numel() - 1

    def tensors(self, axis: Axis | None = None) -> dict[str, torch.Tensor]:
        """Return the tensors that are there by name, those over one axis or all."""
        chosen = {}
        for name, spec in field_specs(PackedBatch).items():
            tensor = getattr(self, name)
            if tensor is not None and (axis is None or spec.axis == axis):
                chosen[name] = tensor
        return chosen

    def map(
        self, change: Callable[[str, torch.Tensor], torch.Tensor], axis: Axis | None = None
    ) -> PackedBatch:
        """Return a copy with each tensor over ``axis`` (None: every one) changed by name."""
        changed: dict[str, Any] = {
            name: change(name, tensor) for name, tensor in self.tensors(axis).items()
        }
        return replace(self, **changed)

    def to(self, device: torch.device) -> PackedBatch:
        """Return a copy whose tensors are on ``device``."""
        return self.map(lambda _, tensor: tensor.to(device))
