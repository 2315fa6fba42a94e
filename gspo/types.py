"""Prompt, Completion, Group, Rollout and PackedBatch: shapes and units, declared once.

Everything left of :class:`PackedBatch` works on token ids and plain Python objects; everything right of it on tensors.
This module imports torch for annotations only, so that reward workers start without loading it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MetricSums = dict[
    str, tuple["torch.Tensor", "torch.Tensor"]
]  # name -> (value sum, weight sum), see gspo.metrics


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task. ``id`` is stable over runs and leads back to its source, e.g. ``train.jsonl:17``."""

    id: str
    text: str
    tokens: list[int]
    answer: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How completions are drawn. ``temperature`` 0 is greedy decoding; ``top_p`` 1 and ``top_k`` 0 switch these off."""

    temperature: float = 1.0
    max_new_tokens: int = 256
    top_p: float = 1.0
    top_k: int = 0


@dataclass(slots=True)
class Completion:
    """One sampled answer to a prompt, with how it was sampled."""

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
    segments: list[int] = field(
        default_factory=list
    )  # segment of each token, a number from 0; empty: not cut
    segment_advantages: list[float] = field(
        default_factory=list
    )  # of each segment; empty: the completion's


@dataclass(slots=True)
class Group:
    """A prompt and its completions, the unit over which advantages are taken."""

    id: int  # unique on its rank
    prompt: Prompt
    completions: list[Completion]


@dataclass(slots=True)
class Rollout:
    """What one call of the sampler gives, on its way through scoring and advantages.

    ``stats`` holds metric sums by name as ``(value, weight)``, see :mod:`gspo.metrics`.
    ``dropped_documents`` and ``dropped_tokens`` count documents that were drawn, carry no gradient and were taken out
    before the update; they stay in the denominators.
    """

    groups: list[Group]
    stats: dict[str, tuple[float, float]] = field(default_factory=dict)
    dropped_documents: int = 0
    dropped_tokens: int = 0


@dataclass(slots=True)
class PackedBatch:
    """R bins of S tokens, seen flat by the loss as T = R * S tokens with D documents in them.

    A document of n tokens fills n - 1 places: its last token is only ever a label. Documents of one group in a bin may
    share a prefix: the prompt without its last token stands before them once, as a document without labels, and each
    goes on from there. The sampled documents come first, then prefixes; the last is padding, there even when nothing
    is padded.
    """

    num_bins: int  # R
    tokens: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64, the next token of the same document; 0 where there is none
    positions: torch.Tensor  # [T] int64, from 0 in each document, or from the end of its prefix
    document_index: torch.Tensor  # [T] int64 in [0, D), D - 1 is padding
    loss_mask: torch.Tensor  # [T] bool, True where the label was sampled by the policy
    old_logps: (
        torch.Tensor
    )  # [T] float32, nats, of the label under the distribution sampled from; 0 outside loss_mask
    advantages: torch.Tensor  # [D] float32
    rewards: torch.Tensor  # [D] float32
    label_counts: torch.Tensor  # [D] int64, labelled tokens of each document
    policy_version: torch.Tensor  # [D] int64
    temperature: torch.Tensor  # [D] float32, > 0 (1 for prefixes and padding)
    num_documents: (
        int  # documents that count in the step's denominators: those here and the dropped ones
    )
    num_label_tokens: int  # the same in labelled tokens
    ids: list[tuple[str, int]] = field(
        default_factory=list
    )  # (prompt id, group id) of each sampled document
    stats: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # metric sums of the rollouts behind this batch
    rollout_continues: bool = (
        False  # more of its rollout waits on this rank; False where rollouts share a buffer
    )
    prefix_index: torch.Tensor | None = (
        None  # [D] int64, document that each also sees, itself if none; None: no prefix
    )
    ref_logps: torch.Tensor | None = (
        None  # [T] float32, nats, under the reference policy at the same temperature
    )
    sampler_logps: torch.Tensor | None = (
        None  # [T] float32, nats, where the trainer's own stand in old_logps
    )
    segment_index: torch.Tensor | None = (
        None  # [T] int64 in [0, K), finer than a document: a turn, a step
    )
    segment_advantages: torch.Tensor | None = None  # [K] float32, in place of ``advantages``

    @property
    def token_advantages(self) -> torch.Tensor | None:  # [T] float32
        """Those of the labelled tokens' segments, whatever elsewhere; None where segments have none of their own."""
        if self.segment_index is None or self.segment_advantages is None:
            return None
        return self.segment_advantages[self.segment_index.where(self.loss_mask, 0)]

    @property
    def bin_length(self) -> int:
        """S, tokens in a bin."""
        return self.tokens.numel() // max(self.num_bins, 1)

    def to(self, device: torch.device) -> PackedBatch:
        """A copy whose tensors are on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PackedBatch(
            **{k: v.to(device) if hasattr(v, "to") else v for k, v in values.items()}
        )
