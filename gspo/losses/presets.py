"""Objectives by the names that papers and tools give them, and how they weigh a document's length.

``preset: NAME`` in a config lays a preset's keys under the config's own, see
:mod:`gspo.config.merge`. ``python -m gspo presets`` prints the table. Learning rates do not carry
over between presets whose gradients differ by a factor; the table has that too.

Not here: the losses (:mod:`gspo.losses.components`), which presets name as a config does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchtune import config

from gspo.losses.inputs import LossInputs, LossOutput, Segments

LENGTHS = (8, 64, 256, 1024)  # tokens, of the documents in the table and in the recipe's log


@dataclass(frozen=True, slots=True)
class Preset:
    """An objective of a paper or tool."""

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
    sections: dict[str, Any] = {
        "loss": {
            "_component_": f"gspo.losses.{component}",
            "clip_low": clip_low,
            "clip_high": clip_high,
            "aggregation": aggregation,
            **loss,
        },
        "advantages": {"estimator": "group_mean_std"},
    }
    if advantages is not None:
        sections["advantages"] |= advantages
    if recipe is not None:
        sections |= recipe
    return Preset(source, sections, note)


PRESETS: dict[str, Preset] = {
    "gspo": _preset("arXiv 2507.18071, eq. 5", "GSPOLoss", 3e-4, 4e-4, "document"),
    "gspo_token": _preset("arXiv 2507.18071, eq. 13", "GSPOTokenLoss", 3e-4, 4e-4, "document"),
    "fast_llm_502": _preset(
        "Fast-LLM, first form of pull request 502", "GSPOLoss", 0.2, 0.2, "token",
        note="loss.normalize_by_documents: true makes it fast_llm_head",
        normalize_by_documents=False,
    ),
    "fast_llm_head": _preset("Fast-LLM", "GSPOLoss", 0.2, 0.2, "token_over_documents"),
    "pipelinerl": _preset(
        "PipelineRL", "GSPOLoss", 0.2, 0.2, "token_over_batch_size", batch_size="${docs_per_step}",
    ),
    "trl_sequence_grpo": _preset(
        "TRL, importance_sampling_level sequence, loss_type grpo",
        "GSPOLoss", 0.2, 0.2, "document",
        note="over the step's documents, where TRL takes the mean of microbatch means",
    ),
    "trl_sequence_dapo": _preset(
        "TRL, importance_sampling_level sequence, its default loss_type",
        "GSPOLoss", 0.2, 0.2, "token",
    ),
    "luspo": _preset("arXiv 2602.05261", "GSPOLoss", 0.2, 0.2, "token_over_documents"),
    "verl": _preset(
        "verl, loss_mode gspo", "GSPOTokenLoss", 0.2, 0.2, "document",
        note="the mean log-ratio is capped at 10 above and nowhere below",
        log_ratio_bound=10.0, bound_below=False,
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
    "multi_scale": _preset(
        "exp(a l_t + (1 - a) mean l)", "MultiScaleLoss", 0.2, 0.2, "document", token_share=0.5,
    ),
}  # fmt: skip


def token_gradient(loss: Any, lengths: Sequence[int] = LENGTHS) -> Tensor:  # [T] float64
    """Return the gradient of a step's loss by each token's log-probability.

    All ratios and advantages are 1.

    Args:
        loss: A component of :mod:`gspo.losses`, or one with the same two methods.
        lengths: Labelled tokens of the documents that the step consists of.
    """
    num_documents = len(lengths)
    label_counts = torch.tensor(lengths)
    documents = torch.arange(num_documents)
    document_index = documents.repeat_interleave(label_counts)
    num_tokens = document_index.numel()
    logps = torch.full((num_tokens,), -1.0, dtype=torch.float64, requires_grad=True)
    entropy = torch.zeros(num_tokens, dtype=torch.float64)
    inputs = LossInputs(
        document_index=document_index,
        loss_mask=torch.ones(num_tokens, dtype=torch.bool),
        old_logps=logps.detach(),
        advantages=torch.ones(num_documents, dtype=torch.float64),
        label_counts=label_counts,
        ref_logps=logps.detach(),
        segments=Segments(document_index, documents, label_counts),
    )
    output = LossOutput(*loss(logps, entropy, inputs))
    mean_loss = output.loss / loss.denominator(num_documents, num_tokens)
    (gradient,) = torch.autograd.grad(mean_loss, logps)
    return gradient


def effective_weights(loss: Any, lengths: Sequence[int] = LENGTHS) -> list[float]:
    """Return what each document weighs in the gradient: the sum of its tokens' coefficients.

    See :func:`token_gradient`. In the paper's GSPO all weigh 1 over the number of documents.
    """
    gradient = token_gradient(loss, lengths)
    by_document = gradient.split(list(lengths))
    return [float(coefficients.abs().sum()) for coefficients in by_document]


def rows() -> list[dict[str, Any]]:
    """Return the table, a dict for each preset.

    A fixed batch size is that of :data:`LENGTHS`, a fixed length the longest of them.
    """
    gspo_loss = _build(PRESETS["gspo"])
    gspo_gradient = token_gradient(gspo_loss)
    return [_row(name, preset, gspo_gradient) for name, preset in PRESETS.items()]


def _build(preset: Preset) -> Any:
    """Build a preset's loss for a step of documents of :data:`LENGTHS`."""
    context = {"docs_per_step": len(LENGTHS), "sampling": {"max_new_tokens": max(LENGTHS)}}
    keys = deepcopy(dict(preset.config))
    cfg = OmegaConf.create({**context, **keys})
    return config.instantiate(cfg.loss)


def _row(name: str, preset: Preset, gspo_gradient: Tensor) -> dict[str, Any]:
    loss = _build(preset)
    gradient = token_gradient(loss)
    # Where the gradients of all tokens agree, the norm is the sum of the coefficients; where they
    # are independent, the root of the sum of squares.
    aligned = gradient.norm(1) / gspo_gradient.norm(1)
    independent = gradient.norm(2) / gspo_gradient.norm(2)
    return {
        "preset": name,
        "ratio": loss.ratio_level,
        "surrogate": loss.surrogate_name,
        "clip_low": loss.clip_low,
        "clip_high": loss.clip_high,
        "aggregation": loss.aggregation,
        "advantage": preset.config["advantages"]["estimator"],
        "weights": effective_weights(loss),
        "gradient_aligned": float(aligned),
        "gradient_independent": float(independent),
        "source": preset.source,
        "note": preset.note,
    }
