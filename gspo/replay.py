"""``python -m gspo replay``: a dumped step under any objective, on a CPU and without the model.

The log-probabilities are those of the file, so the losses of :mod:`gspo.losses` run as they did in training, a
microbatch at a time, and autograd gives the gradient by each log-probability. Advantages are those of the run, whatever
estimator a preset has. Not here: the gradient of the weights, and an entropy bonus, since a dump has no entropies.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import config
from torchtune.config._utils import _merge_yaml_and_cli_args

from gspo import losses
from gspo.config.checks import check_config, refusals, require
from gspo.errors import InputError, did_you_mean
from gspo.losses.accounting import LENGTH_BINS
from gspo.losses.presets import PRESETS
from gspo.losses.units import RatioTerms, SurrogateTerms, per_label, sums_at
from gspo.metrics import StepMetrics, public
from gspo.parallel.context import split
from gspo.policy.microbatch import Microbatch, batch_segments, row_inputs
from gspo.run.dump import Dump, DumpedMicrobatch
from gspo.types import PackedBatch

_NEEDS = {"kl_coef": "ref_logps", "correction": "sampler_logps", "entropy_coef": "entropies"}


_COUNTS = {
    "num_documents": "_late_documents",
    "num_label_tokens": "_late_tokens",
}  # and the quarantined in them


_CLIPS = ("any", "any_low", "any_high", "binding", "binding_low", "binding_high")


@dataclass(frozen=True, slots=True)
class Documents:
    """What the sampled documents of a dump have under any objective, in its order."""

    rows: list[dict[str, Any]]
    lengths: Tensor  # [D] labelled tokens
    valid: Tensor  # [D] bool, False: quarantined


@dataclass(frozen=True, slots=True)
class Score:
    """A dump under one objective; D are the documents of :class:`Documents`."""

    name: str
    loss: dict[str, Any]  # as a config has it
    advantages: str | None  # the estimator that a preset has, which the dump's need not be of
    denominator: float
    metrics: dict[str, float]
    gradient: Tensor  # [D] float64, share of the sum of |d loss / d logp|
    clipped: (
        Tensor | None
    )  # [D, 6] tokens in ratios that are clipped, as _CLIPS; None: the loss does not say
    ratio: Tensor | None  # [D] mean over the document's tokens of the ratio that each is in


def build_loss(run: dict[str, Any], preset: str | None, overrides: Sequence[str]) -> DictConfig:
    """The ``loss`` of a run's config or of a preset, with the overrides, checked.

    Raises:
        InputError: no preset has that name, or an override cannot be.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"preset: {preset!r} is not known.{did_you_mean(preset, PRESETS)}")
    for override in overrides:
        key = override.lstrip("~").partition("=")[0]
        remedy = "change the objective alone, as loss.clip_high=0.3 does"
        require(key.split(".")[0] == "loss", key, override, "is not a key of the objective", remedy)
    absent = {"loss", "advantages", "docs_per_step", "sampling"} - run.keys()
    require(
        not absent,
        "config",
        sorted(run),
        f"of the file lacks {', '.join(sorted(absent))}",
        "dump the step again",
    )
    keys: dict[str, Any] = {
        name: run[name] for name in ("docs_per_step", "sampling")
    }  # to which presets refer
    if preset is None:
        keys["loss"] = _loss_in_file(run["loss"], overrides)
    _check_plain(keys)
    if preset is not None:
        keys["loss"] = dict(PRESETS[preset].config["loss"])
    with refusals("overrides", "write key=value, as loss.clip_high=0.3"):
        cfg = _merge_yaml_and_cli_args(argparse.Namespace(**keys), list(overrides))
    return check_config(cfg, required=tuple(keys), passed={}).loss


def _loss_in_file(loss: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """The ``loss`` that a dump names, which may come from anyone: only a component of :mod:`gspo.losses` is built.

    Raises:
        InputError: it is another, and the command line names none in its place.
    """
    known = [f"gspo.losses.{name}" for name in losses.__all__]
    named = loss.get("_component_") if isinstance(loss, dict) else None
    replaced = any(override.startswith(("loss=", "loss._component_=")) for override in overrides)
    require(
        isinstance(loss, dict) and (named in known or replaced), "config.loss._component_", named,
        "of the file is no objective of gspo.losses, and a file may not name code that is run",
        "name your own loss on the command line: loss._component_=my_losses.MyLoss",
    )  # fmt: skip
    return dict(loss)


def _check_plain(values: Any, key: str = "config") -> None:
    """Refuse what is more than data in a file's config: an interpolation, or a component inside another's arguments."""
    if isinstance(values, dict):
        for name, value in values.items():
            nested = name == "_component_" and key != "config.loss"
            require(
                not nested, f"{key}.{name}", value, "may not stand in a file", "dump the step again"
            )
            _check_plain(value, f"{key}.{name}")
    elif isinstance(values, list):
        for number, value in enumerate(values):
            _check_plain(value, f"{key}.{number}")
    elif isinstance(values, str):
        require(
            "${" not in values,
            key,
            values,
            "has an interpolation, which a dump never has",
            "dump the step again",
        )


def find_documents(dump: Dump) -> Documents:
    """The sampled documents, without prefixes and padding."""
    rows: list[dict[str, Any]] = []
    for m in dump.microbatches:
        batch, num = m.batch, len(m.batch.ids)
        found = {"new_logps": m.new_logps, "old_logps": batch.old_logps}
        others = ("ref_logps", "sampler_logps", "token_advantages")
        found |= {n: x for n in others if (x := getattr(batch, n)) is not None}
        bad = {
            name: _sums(~x.isfinite() & batch.loss_mask, batch)[:num] > 0
            for name, x in found.items()
        }
        bad["advantage"] = ~batch.advantages[:num].isfinite()
        means = _means(m.new_logps - batch.old_logps, batch)
        own = batch.token_advantages
        advantages = (
            batch.advantages if own is None else _means(own, batch)
        )  # those of segments, by their tokens
        for d, (prompt_id, group_id) in enumerate(batch.ids):
            rows.append(
                {
                    "prompt_id": prompt_id,
                    "group_id": group_id,
                    "rank": m.rank,
                    "policy_version": int(batch.policy_version[d]),
                    "length": int(batch.label_counts[d]),
                    "advantage": float(advantages[d]),
                    "reward": float(batch.rewards[d]),
                    "mean_log_ratio": float(means[d]),
                    "not_finite": [name for name, flags in bad.items() if flags[d]],
                }
            )
    lengths = torch.tensor([row["length"] for row in rows], dtype=torch.int64)
    return Documents(
        rows, lengths, torch.tensor([not row["not_finite"] for row in rows], dtype=torch.bool)
    )


def _sums(values: Tensor, batch: PackedBatch) -> Tensor:  # [T] -> [D]
    return sums_at(values.double(), batch.document_index, batch.label_counts.numel())


def _means(values: Tensor, batch: PackedBatch) -> Tensor:  # [T] -> [D]
    """Over labelled tokens."""
    return per_label(_sums(torch.where(batch.loss_mask, values, 0.0), batch), batch.label_counts)


def score(dump: Dump, preset: str | None = None, overrides: Sequence[str] = ()) -> Score:
    """The dump under an objective, see :func:`build_loss`.

    Raises:
        InputError: the loss refuses its arguments, or needs what the dump does not have.
    """
    cfg = build_loss(dump.metadata["config"], preset, overrides)
    with refusals("loss", "correct its arguments"):
        loss = config.instantiate(cfg)
    for key, needed in _NEEDS.items():
        if getattr(loss, key, None) and any(
            getattr(m.batch, needed, None) is None for m in dump.microbatches
        ):
            raise InputError(
                f"loss.{key}: {getattr(loss, key)!r} needs {needed}, which the file lacks; drop it with ~loss.{key}"
            )
    heard = _listen(loss)
    sums, totals, gradients = StepMetrics(), [], []
    for m in dump.microbatches:
        total, found, gradient = _backward(loss, m)
        totals.append(total)
        sums.add(found)
        gradients.append(_sums(gradient.abs(), m.batch)[: len(m.batch.ids)])
    metrics = sums.alone()
    counts = (dump.metadata[key] - int(metrics.get(late, 0)) for key, late in _COUNTS.items())
    denominator = max(loss.denominator(*counts), 1.0)
    metrics["loss"] = sum(float(total / denominator) for total in totals)
    gradient = torch.cat(gradients)
    documents = [
        _clipped(terms, found, m.batch)
        for (terms, found), m in zip(heard, dump.microbatches, strict=bool(heard))
    ]
    return Score(
        name=" ".join((preset or "run", *overrides)),
        loss=OmegaConf.to_container(cfg, resolve=True),
        advantages=None if preset is None else PRESETS[preset].config["advantages"]["estimator"],
        denominator=denominator,
        metrics={key: metrics[key] for key in sorted(public(metrics)) if key != "entropy"},
        gradient=gradient / gradient.sum().clamp(min=torch.finfo(torch.float64).tiny),
        clipped=torch.cat([clips for clips, _ in documents]) if heard else None,
        ratio=torch.cat([ratios for _, ratios in documents]) if heard else None,
    )


def _backward(
    loss: Any, m: DumpedMicrobatch
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Tensor]:
    """The undivided loss sum of a microbatch, its metric sums, and the gradient by log-probability, [T]."""
    batch = m.batch
    rows = batch.loss_mask.nonzero().squeeze(-1)
    whole = Microbatch(
        shard=split(batch, None),
        batch=batch,
        label_rows=rows,
        label_counts=batch.label_counts.tolist(),
        counted=None,
        attention_mask=None,  # which only a model asks for
        segments=batch_segments(batch, batch, rows, torch.device("cpu")),
    )
    logps = m.new_logps[rows].requires_grad_()
    total, pairs = loss(logps, torch.zeros_like(rows, dtype=logps.dtype), row_inputs(whole, None))
    (gradient,) = torch.autograd.grad(total, logps, materialize_grads=True)
    return total.detach(), pairs, torch.zeros_like(m.new_logps).index_put((rows,), gradient)


def _listen(loss: Any) -> list[tuple[RatioTerms, SurrogateTerms]]:
    """What the surrogate of a loss of :mod:`gspo.losses` gets and gives from now on; empty for one of the user's."""
    heard: list[tuple[RatioTerms, SurrogateTerms]] = []
    objective = getattr(loss, "objective", None)
    if isinstance(objective, partial) and "surrogate" in objective.keywords:
        surrogate = objective.keywords["surrogate"]

        def listening(terms: RatioTerms) -> SurrogateTerms:
            found = surrogate(terms)
            heard.append((terms, found))
            return found

        loss.objective = partial(objective, surrogate=listening)
    return heard


def _clipped(
    terms: RatioTerms, found: SurrogateTerms, batch: PackedBatch
) -> tuple[Tensor, Tensor]:  # [D, 6], [D]
    """Tokens in clipped ratios as _CLIPS, and the mean ratio of each sampled document's tokens."""
    units, log_ratio = terms.units, terms.log_ratio.detach()
    low, high = found.outside & (log_ratio < 0), found.outside & (log_ratio > 0)
    flags = torch.stack((found.outside, low, high, found.low | found.high, found.low, found.high))
    values = torch.cat((flags.double(), log_ratio.double().exp()[None]))
    picked = torch.where(units.valid, values * units.num_tokens, 0.0)
    totals = sums_at(picked, units.document, batch.label_counts.numel())
    *clips, ratios = totals[:, : len(batch.ids)]
    return torch.stack(clips, 1), per_label(ratios, batch.label_counts[: len(batch.ids)])


def result(
    file: Path, dump: Dump, documents: Documents, scores: list[Score], top: int
) -> dict[str, Any]:
    """What ``--json`` writes: the dump, each objective, and the ``top`` documents by the first one's gradient share."""
    found = dump.metadata
    order = scores[0].gradient.argsort(descending=True, stable=True)[:top].tolist()
    answer = {
        "file": str(file),
        **{
            key: found[key]
            for key in ("step", "num_documents", "num_label_tokens", "sampling", "seed")
        },
        "advantages": found["config"]["advantages"]["estimator"],
        "documents_in_file": len(documents.rows),
        "tokens_in_file": int(documents.lengths.sum()),
        "logged": found["metrics"],
        "quarantined": [row for row in documents.rows if row["not_finite"]],
        "objectives": [
            {
                "name": s.name,
                "loss": s.loss,
                "advantages": s.advantages or found["config"]["advantages"]["estimator"],
                "denominator": s.denominator,
                "metrics": s.metrics,
                "clip": _clip(documents, s, documents.valid),
                "by_length": _by_length(documents, s),
            }
            for s in scores
        ],
        "documents": [
            documents.rows[d] | {"objectives": [_of_document(documents, s, d) for s in scores]}
            for d in order
        ],
    }
    return answer


def _clip(documents: Documents, s: Score, chosen: Tensor) -> dict[str, dict[str, float]] | None:
    """Shares of the chosen documents with a clipped ratio, and of their tokens that are in one.

    ``any`` is outside the band, ``binding`` only where the clip stops the gradient.
    """
    if s.clipped is None:
        return None
    tokens = s.clipped[chosen]
    shares = {
        "documents": (tokens > 0).sum(0) / max(len(tokens), 1),
        "tokens": tokens.sum(0) / documents.lengths[chosen].sum().clamp(min=1),
    }
    return {of: dict(zip(_CLIPS, values.tolist(), strict=True)) for of, values in shares.items()}


def _by_length(documents: Documents, s: Score) -> list[dict[str, Any]]:
    found, before = [], 0
    for longest in (*LENGTH_BINS, None):
        chosen = documents.valid & (documents.lengths > before)
        if longest is not None:
            chosen &= documents.lengths <= longest
        name = f">{before}" if longest is None else f"{before + 1}-{longest}"
        counts = {"documents": int(chosen.sum()), "tokens": int(documents.lengths[chosen].sum())}
        share = float(s.gradient[chosen].sum())
        found.append(
            {"length": name, **counts, "gradient": share, "clip": _clip(documents, s, chosen)}
        )
        before = longest or before
    return found


def _of_document(documents: Documents, s: Score, d: int) -> dict[str, Any]:
    """What an objective makes of a document; tokens that are in a clipped ratio, by how."""
    clipped = (
        None
        if s.clipped is None
        else {k: int(n) for k, n in zip(_CLIPS, s.clipped[d].tolist(), strict=True)}
    )
    known = s.ratio is not None and bool(documents.valid[d])
    return {
        "ratio": float(s.ratio[d]) if known else None,  # type: ignore[index]
        "clipped_tokens": clipped,
        "gradient": float(s.gradient[d]),
    }
