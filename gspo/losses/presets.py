"""Objectives by the names that papers and tools give them, as config keys, and what each makes of a document's length.

``preset: NAME`` in a config lays a preset's keys under the config's own. ``python -m gspo presets`` prints the table.
Learning rates do not carry over between presets whose gradients differ by a factor; the table has that too.

Not here: the losses (:mod:`gspo.losses`), which presets name as a config does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchtune import config

from gspo.losses.inputs import LossInputs, Segments

logger = logging.getLogger(__name__)


LENGTHS = (8, 64, 256, 1024)  # of the documents that the table and the recipe's log speak of


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of the table."""

    source: str
    config: Mapping[str, Any]  # keys of a recipe's config
    note: str = ""


def _preset(
    source: str,
    component: str,
    clip_low: float | None,
    clip_high: float | None,
    aggregation: str,
    *,
    note: str = "",
    advantages: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    **loss: Any,
) -> Preset:
    band = {"clip_low": clip_low, "clip_high": clip_high, "aggregation": aggregation}
    keys = {
        "loss": {"_component_": f"gspo.losses.{component}", **band, **loss},
        "advantages": {"estimator": "group_mean_std", **(advantages or {})},
    }
    return Preset(source, {**keys, **(recipe or {})}, note)


PRESETS: dict[str, Preset] = {
    "gspo": _preset("arXiv 2507.18071, eq. 5", "GSPOLoss", 3e-4, 4e-4, "document"),
    "gspo_token": _preset("arXiv 2507.18071, eq. 13", "GSPOTokenLoss", 3e-4, 4e-4, "document"),
    "fast_llm_502": _preset(
        "Fast-LLM, first form of pull request 502", "GSPOLoss", 0.2, 0.2, "token",
        note="loss.normalize_by_documents: true makes it fast_llm_head", normalize_by_documents=False,
    ),
    "fast_llm_head": _preset("Fast-LLM", "GSPOLoss", 0.2, 0.2, "token_over_documents"),
    "pipelinerl": _preset(
        "PipelineRL", "GSPOLoss", 0.2, 0.2, "token_over_batch_size", batch_size="${docs_per_step}",
    ),
    "trl_sequence_grpo": _preset(
        "TRL, importance_sampling_level sequence, loss_type grpo", "GSPOLoss", 0.2, 0.2, "document",
        note="over the step's documents, where TRL takes the mean of microbatch means",
    ),
    "trl_sequence_dapo": _preset(
        "TRL, importance_sampling_level sequence, its default loss_type", "GSPOLoss", 0.2, 0.2, "token"
    ),
    "luspo": _preset("arXiv 2602.05261", "GSPOLoss", 0.2, 0.2, "token_over_documents"),
    "verl": _preset(
        "verl, loss_mode gspo", "GSPOTokenLoss", 0.2, 0.2, "document",
        note="the mean log-ratio is capped at 10 above and nowhere below", log_ratio_bound=10.0, bound_below=False,
    ),
    "grpo": _preset("arXiv 2402.03300, eq. 3", "GRPOLoss", 0.2, 0.2, "document"),
    "dr_grpo": _preset(
        "arXiv 2503.20783", "GRPOLoss", 0.2, 0.2, "constant",
        advantages={"estimator": "group_mean"}, constant_length="${sampling.max_new_tokens}",
    ),
    "dapo": _preset(
        "arXiv 2503.14476, eq. 8", "GRPOLoss", 0.2, 0.28, "token",
        advantages={"drop_dead_groups": True, "refill_dead_groups": True},
        note="groups of equal rewards are replaced",
    ),
    "cispo": _preset("arXiv 2506.13585, eq. 4", "CISPOLoss", None, 5.0, "token"),
    "blog_gspo": _preset(
        "a published recipe of groups of 4", "GSPOLoss", 0.002, 0.002, "document",
        note="group_size 4, optimizer.lr 1e-7", log_ratio_bound=10.0,
        recipe={"group_size": 4, "optimizer": {"lr": 1e-7}},
    ),
    "fspo": _preset("arXiv 2509.09177", "FSPOLoss", 0.2, 0.2, "document"),
    "multi_scale": _preset("exp(a l_t + (1 - a) mean l)", "MultiScaleLoss", 0.2, 0.2, "document", token_share=0.5),
}  # fmt: skip


def token_gradient(loss: Any, lengths: Sequence[int] = LENGTHS) -> Tensor:  # [T] float64
    """The gradient of an optimizer step's loss by the log-probability of each token, at a ratio of 1 and A = 1.

    Args:
        loss: a component of :mod:`gspo.losses`, or one with the same two methods.
        lengths: labelled tokens of the documents that the step consists of.
    """
    counts = torch.tensor(lengths)
    index = torch.arange(len(lengths)).repeat_interleave(counts)
    logps = torch.full((int(counts.sum()),), -1.0, dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        document_index=index,
        loss_mask=torch.ones_like(index, dtype=torch.bool),
        old_logps=logps.detach(),
        advantages=torch.ones(len(lengths), dtype=torch.float64),
        label_counts=counts,
        ref_logps=logps.detach(),
        segments=Segments(index, torch.arange(len(lengths)), counts),
    )
    total, _ = loss(logps, torch.zeros_like(index, dtype=torch.float64), inputs)
    (gradient,) = torch.autograd.grad(total / loss.denominator(len(lengths), index.numel()), logps)
    return gradient


def effective_weights(loss: Any, lengths: Sequence[int] = LENGTHS) -> list[float]:
    """What each document weighs in the gradient: the sum of its tokens' coefficients, see :func:`token_gradient`.

    In the paper's GSPO all weigh 1 over the number of documents.
    """
    return [float(part.abs().sum()) for part in token_gradient(loss, lengths).split(list(lengths))]


def rows() -> list[dict[str, Any]]:
    """The table. A fixed batch size is that of :data:`LENGTHS`, a fixed length the longest of them."""
    gradients, found = {}, []
    for name, preset in PRESETS.items():
        context = {"docs_per_step": len(LENGTHS), "sampling": {"max_new_tokens": max(LENGTHS)}}
        cfg = OmegaConf.create({**context, **deepcopy(dict(preset.config))})
        loss = config.instantiate(cfg.loss)
        gradients[name] = token_gradient(loss)
        # With gradients of the tokens that all agree the norm is the sum of the coefficients, with independent ones
        # the root of the sum of squares.
        aligned, independent = (
            float(gradients[name].norm(p) / gradients["gspo"].norm(p)) for p in (1, 2)
        )
        found.append(
            {
                "preset": name,
                "ratio": loss.ratio_level,
                "surrogate": loss.surrogate_name,
                "clip_low": loss.clip_low,
                "clip_high": loss.clip_high,
                "aggregation": loss.aggregation,
                "advantage": cfg.advantages.estimator,
                "weights": effective_weights(loss),
                "gradient_aligned": aligned,
                "gradient_independent": independent,
                "source": preset.source,
                "note": preset.note,
            }
        )
    return found
