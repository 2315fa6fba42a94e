"""Score a dumped step under any objective, on a CPU and without the model.

The log-probabilities are those of the file, so the losses of :mod:`gspo.losses` run as they did in
training, a microbatch at a time, and autograd gives the gradient by each log-probability.
Advantages are those of the run, whatever estimator a preset has.

Not here: the gradient of the weights, and an entropy bonus, since a dump has no entropies; the
command line (:mod:`gspo.commands.replay`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchtune import config

from gspo import losses
from gspo.compat import merge_overrides
from gspo.config import refusals
from gspo.config.checks import component_problems
from gspo.errors import InputError, InputErrors, did_you_mean, require
from gspo.losses.accounting import LENGTH_BINS
from gspo.losses.inputs import LossOutput, traits_of
from gspo.losses.presets import PRESETS
from gspo.losses.units import RatioTerms, SurrogateTerms, per_label, sums_at
from gspo.metrics import StepMetrics, public
from gspo.parallel import split
from gspo.policy import Microbatch, batch_segments, row_inputs
from gspo.run.dump import Dump, DumpedMicrobatch
from gspo.types import Axis, PackedBatch, field_specs

_CONTEXT = ("docs_per_step", "sampling")  # keys of a run's config to which presets refer
_DUMP_AGAIN = "dump the step again"
_CPU = torch.device("cpu")


class _Clips(NamedTuple):
    """Values by how a ratio is clipped: outside the clip range at all, or with a stopped gradient.

    The fields are the keys of the JSON.
    """

    any: Any
    any_low: Any
    any_high: Any
    binding: Any
    binding_low: Any
    binding_high: Any


@dataclass(frozen=True, slots=True)
class Documents:
    """The sampled documents of a dump, in its order, and what they have under any objective."""

    rows: list[dict[str, Any]]
    lengths: Tensor  # [D] labelled tokens
    valid: Tensor  # [D] bool, False: quarantined


@dataclass(frozen=True, slots=True)
class Score:
    """A dump under one objective; D are the documents of :class:`Documents`."""

    name: str
    loss: dict[str, Any]  # the section of a config
    advantages: str | None  # the estimator that a preset has; the dump's may be another
    denominator: float
    metrics: dict[str, float]
    gradient: Tensor  # [D] float64, share of the sum of |d loss / d logp|
    # [D, 6] tokens in ratios that are clipped, see _Clips; None: the loss does not say
    clipped: Tensor | None
    ratio: Tensor | None  # [D] mean over the document's tokens of the ratio that each is in


def loss_section(
    run: dict[str, Any], preset: str | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the ``loss`` of a run's config or of a preset, with the overrides, checked.

    Raises:
        InputError: No preset has that name, or an override cannot be.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError("preset", preset, "is not known", did_you_mean(preset, PRESETS))
    _check_overrides(overrides)
    keys = _keys_of_file(run, None if preset is not None else overrides)
    if preset is not None:
        keys["loss"] = dict(PRESETS[preset].config["loss"])
    with refusals("overrides", "write key=value, as loss.clip_high=0.3"):
        cfg = merge_overrides(argparse.Namespace(**keys), overrides)
        merged = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(merged, dict)
    problems = list(component_problems({"loss": merged["loss"]}, {}))
    if problems:
        raise InputErrors(problems)
    return merged["loss"]


def _keys_of_file(run: dict[str, Any], overrides: Sequence[str] | None) -> dict[str, Any]:
    """Return the keys that presets refer to, and the loss where there are ``overrides`` for it.

    Raises:
        InputError: One is absent, or is more than data.
    """
    absent = {"loss", "advantages", *_CONTEXT} - run.keys()
    problem = f"of the file lacks {', '.join(sorted(absent))}"
    require(not absent, "config", sorted(run), problem, _DUMP_AGAIN)
    keys: dict[str, Any] = {name: run[name] for name in _CONTEXT}
    if overrides is not None:
        keys["loss"] = _loss_in_file(run["loss"], overrides)
    _check_plain(keys)
    return keys


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.lstrip("~").partition("=")[0]
        require(
            key.split(".")[0] == "loss",
            key,
            override,
            "is not a key of the objective",
            "change the objective alone, as loss.clip_high=0.3 does",
        )


def _loss_in_file(loss: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the ``loss`` that a dump names; the file may come from anyone.

    Only a component of :mod:`gspo.losses` is built.

    Raises:
        InputError: It is another, and the command line names none in its place.
    """
    known = [f"gspo.losses.{name}" for name in losses.__all__]
    named = loss.get("_component_") if isinstance(loss, dict) else None
    is_replaced = any(o.startswith(("loss=", "loss._component_=")) for o in overrides)
    require(
        isinstance(loss, dict) and (named in known or is_replaced),
        "config.loss._component_",
        named,
        "of the file is no objective of gspo.losses, and a file may not name code that is run",
        "name your own loss on the command line: loss._component_=my_losses.MyLoss",
    )
    return dict(loss)


def _check_plain(values: Any, key: str = "config") -> None:
    """Refuse what is more than data in a file's config.

    Raises:
        InputError: An interpolation, or a component inside another's arguments.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            is_nested = name == "_component_" and key != "config.loss"
            require(not is_nested, f"{key}.{name}", value, "may not stand in a file", _DUMP_AGAIN)
            _check_plain(value, f"{key}.{name}")
    elif isinstance(values, list):
        for number, value in enumerate(values):
            _check_plain(value, f"{key}.{number}")
    elif isinstance(values, str):
        problem = "has an interpolation, which a dump never has"
        require("${" not in values, key, values, problem, _DUMP_AGAIN)


def find_documents(dump: Dump) -> Documents:
    """Return the sampled documents, without prefixes and padding."""
    rows: list[dict[str, Any]] = []
    for microbatch in dump.microbatches:
        rows += _document_rows(microbatch)
    lengths = torch.tensor([row["length"] for row in rows], dtype=torch.int64)
    valid = torch.tensor([not row["not_finite"] for row in rows], dtype=torch.bool)
    return Documents(rows, lengths, valid)


def _document_rows(microbatch: DumpedMicrobatch) -> Iterator[dict[str, Any]]:
    batch = microbatch.batch
    not_finite = _not_finite(microbatch)
    log_ratios = _means(microbatch.new_logps - batch.old_logps, batch)
    advantages = batch.advantages
    if batch.token_advantages is not None:  # those of segments, by their tokens
        advantages = _means(batch.token_advantages, batch)
    for document, (prompt_id, group_id) in enumerate(batch.ids):
        yield {
            "prompt_id": prompt_id,
            "group_id": group_id,
            "rank": microbatch.rank,
            "policy_version": int(batch.policy_version[document]),
            "length": int(batch.label_counts[document]),
            "advantage": float(advantages[document]),
            "reward": float(batch.rewards[document]),
            "mean_log_ratio": float(log_ratios[document]),
            "not_finite": [name for name, flags in not_finite.items() if flags[document]],
        }


def _not_finite(microbatch: DumpedMicrobatch) -> dict[str, Tensor]:  # name -> [D] bool
    """Return which documents have a value that is not finite, by the name of the value."""
    batch = microbatch.batch
    values = {"new_logps": microbatch.new_logps}
    for name, tensor in batch.tensors(Axis.SLOT).items():
        if field_specs(PackedBatch)[name].logps:
            values[name] = tensor
    if batch.token_advantages is not None:
        values["token_advantages"] = batch.token_advantages
    flags = {}
    for name, of_slots in values.items():
        flags[name] = _sums(~of_slots.isfinite() & batch.loss_mask, batch) > 0
    flags["advantage"] = ~batch.advantages.isfinite()
    return flags


def _sums(values: Tensor, batch: PackedBatch) -> Tensor:  # [T] -> [D] float64
    """Add up values over each document's slots."""
    return sums_at(values.double(), batch.document_index, batch.label_counts.numel())


def _means(values: Tensor, batch: PackedBatch) -> Tensor:  # [T] -> [D] float64
    """Average values over each document's labelled tokens."""
    picked = torch.where(batch.loss_mask, values, 0.0)
    return per_label(_sums(picked, batch), batch.label_counts)


def score(dump: Dump, preset: str | None = None, overrides: Sequence[str] = ()) -> Score:
    """Score the dump under an objective, see :func:`loss_section`.

    Raises:
        InputError: The loss refuses its arguments, or needs what the dump does not have.
    """
    section = loss_section(dump.metadata["config"], preset, overrides)
    with refusals("loss"):
        loss = config.instantiate(OmegaConf.create(section))
    _check_needs(loss, section, dump)
    surrogates = _listen(loss)
    backwards = [_backward(loss, microbatch) for microbatch in dump.microbatches]
    totals = _Totals.of(loss, dump, backwards)
    clipped = _all_clipped(surrogates, dump) if surrogates else None
    estimator = None
    if preset is not None:
        estimator = PRESETS[preset].config["advantages"]["estimator"]
    return Score(
        name=" ".join((preset or "run", *overrides)),
        loss=section,
        advantages=estimator,
        denominator=totals.denominator,
        metrics=totals.metrics,
        gradient=_gradient_shares(backwards),
        clipped=None if clipped is None else clipped.tokens,
        ratio=None if clipped is None else clipped.ratio,
    )


def _check_needs(loss: Any, section: dict[str, Any], dump: Dump) -> None:
    """Refuse an option that needs an input which the dump does not have."""
    for option, needed in traits_of(loss).needs.items():
        for microbatch in dump.microbatches:
            require(
                getattr(microbatch.batch, needed, None) is not None,
                f"loss.{option}",
                section.get(option),
                f"needs {needed}, which the file lacks",
                f"drop it with ~loss.{option}",
            )


class _Backward(NamedTuple):
    """A microbatch under an objective."""

    output: LossOutput
    document_gradient: Tensor  # [D] float64, sums of |d loss / d logp|


def _backward(loss: Any, microbatch: DumpedMicrobatch) -> _Backward:
    batch = microbatch.batch
    whole = _whole_microbatch(batch)
    rows = whole.label_rows
    logps = microbatch.new_logps[rows].requires_grad_()
    entropy = torch.zeros_like(logps)
    output = LossOutput(*loss(logps, entropy, row_inputs(whole, None)))
    (gradient,) = torch.autograd.grad(output.loss, logps, materialize_grads=True)
    of_slots = torch.zeros_like(microbatch.new_logps).index_put((rows,), gradient)
    of_documents = _sums(of_slots.abs(), batch)[: len(batch.ids)]
    return _Backward(output._replace(loss=output.loss.detach()), of_documents)


def _whole_microbatch(batch: PackedBatch) -> Microbatch:
    """Return what an objective's inputs are taken from."""
    rows = batch.loss_mask.nonzero().squeeze(-1)
    return Microbatch(
        shard=split(batch, None),
        batch=batch,
        label_rows=rows,
        label_counts=batch.label_counts.tolist(),
        counted=None,
        attention_mask=None,  # which only a model asks for
        segments=batch_segments(batch, batch, rows, _CPU),
    )


def _gradient_shares(backwards: list[_Backward]) -> Tensor:  # [D]
    gradient = torch.cat([backward.document_gradient for backward in backwards])
    smallest = torch.finfo(torch.float64).tiny
    return gradient / gradient.sum().clamp(min=smallest)


class _Totals(NamedTuple):
    """All microbatches under an objective."""

    denominator: float
    metrics: dict[str, float]

    @classmethod
    def of(cls, loss: Any, dump: Dump, backwards: list[_Backward]) -> _Totals:
        step = StepMetrics()
        for backward in backwards:
            step.add(backward.output.metrics, backward.output.not_finite)
        metrics = step.alone()
        # Documents found not finite are in no denominator.
        num_documents = dump.metadata["num_documents"] - int(step.not_finite.documents)
        num_label_tokens = dump.metadata["num_label_tokens"] - int(step.not_finite.tokens)
        denominator = max(loss.denominator(num_documents, num_label_tokens), 1.0)
        shares = [float(backward.output.loss / denominator) for backward in backwards]
        metrics["loss"] = sum(shares)
        shown = public(metrics)
        shown.pop("entropy", None)  # a dump has none
        return cls(denominator, dict(sorted(shown.items())))


class _Surrogate(NamedTuple):
    """The input and the output of a surrogate."""

    terms: RatioTerms
    result: SurrogateTerms


def _listen(loss: Any) -> list[_Surrogate]:
    """Return a list that fills with the calls of a loss's surrogate from now on.

    It stays empty for a loss of the user's, whose parts are not known.
    """
    calls: list[_Surrogate] = []
    objective = getattr(loss, "objective", None)
    if isinstance(objective, partial) and "surrogate" in objective.keywords:
        surrogate = objective.keywords["surrogate"]

        def listening(terms: RatioTerms) -> SurrogateTerms:
            result = surrogate(terms)
            calls.append(_Surrogate(terms, result))
            return result

        loss.objective = partial(objective, surrogate=listening)
    return calls


class _Clipped(NamedTuple):
    """The effect of the clip on documents."""

    tokens: Tensor  # [D, 6] in clipped ratios, see _Clips
    ratio: Tensor  # [D] mean over the document's tokens


def _all_clipped(surrogates: list[_Surrogate], dump: Dump) -> _Clipped:
    parts = []
    for surrogate, microbatch in zip(surrogates, dump.microbatches, strict=True):
        parts.append(_clipped(surrogate, microbatch.batch))
    return _Clipped(
        tokens=torch.cat([part.tokens for part in parts]),
        ratio=torch.cat([part.ratio for part in parts]),
    )


def _clipped(surrogate: _Surrogate, batch: PackedBatch) -> _Clipped:
    """Count tokens in clipped ratios, and average ratios, of each sampled document."""
    units, clips = surrogate.terms.units, surrogate.result
    log_ratio = surrogate.terms.log_ratio.detach()
    flags = _Clips(
        any=clips.outside,
        any_low=clips.outside & (log_ratio < 0),
        any_high=clips.outside & (log_ratio > 0),
        binding=clips.low | clips.high,
        binding_low=clips.low,
        binding_high=clips.high,
    )
    values = torch.cat((torch.stack(flags).double(), log_ratio.double().exp()[None]))
    picked = torch.where(units.valid, values * units.num_tokens, 0.0)
    num_sampled = len(batch.ids)
    totals = sums_at(picked, units.document, batch.label_counts.numel())[:, :num_sampled]
    return _Clipped(totals[:-1].T, per_label(totals[-1], batch.label_counts[:num_sampled]))


def result(
    file: Path, dump: Dump, documents: Documents, scores: list[Score], top: int
) -> dict[str, Any]:
    """Return what ``--json`` writes.

    It has the dump, each objective, and the ``top`` documents by the first one's gradient share.
    """
    metadata = dump.metadata
    estimator = metadata["config"]["advantages"]["estimator"]
    return {
        "file": str(file),
        "step": metadata["step"],
        "num_documents": metadata["num_documents"],
        "num_label_tokens": metadata["num_label_tokens"],
        "sampling": metadata["sampling"],
        "seed": metadata["seed"],
        "advantages": estimator,
        "documents_in_file": len(documents.rows),
        "tokens_in_file": int(documents.lengths.sum()),
        "logged": metadata["metrics"],
        "quarantined": [row for row in documents.rows if row["not_finite"]],
        "objectives": [_of_objective(documents, score, estimator) for score in scores],
        "documents": list(_top_rows(documents, scores, top)),
    }


def _top_rows(documents: Documents, scores: list[Score], top: int) -> Iterator[dict[str, Any]]:
    order = scores[0].gradient.argsort(descending=True, stable=True)
    for document in order[:top].tolist():
        objectives = [_of_document(documents, score, document) for score in scores]
        yield documents.rows[document] | {"objectives": objectives}


def _of_objective(documents: Documents, score: Score, estimator: str) -> dict[str, Any]:
    return {
        "name": score.name,
        "loss": score.loss,
        "advantages": score.advantages or estimator,
        "denominator": score.denominator,
        "metrics": score.metrics,
        "clip": _clip_shares(documents, score, documents.valid),
        "by_length": list(_by_length(documents, score)),
    }


def _clip_shares(
    documents: Documents,
    score: Score,
    chosen: Tensor,  # [D] bool
) -> dict[str, dict[str, float]] | None:
    """Return shares of the chosen documents with a clipped ratio, and of their tokens in one.

    ``any`` is outside the clip range, ``binding`` only where the clip stops the gradient.
    """
    if score.clipped is None:
        return None
    tokens = score.clipped[chosen]
    num_tokens = documents.lengths[chosen].sum().clamp(min=1)
    of_documents = (tokens > 0).sum(0) / max(len(tokens), 1)
    of_tokens = tokens.sum(0) / num_tokens
    return {
        "documents": _Clips(*of_documents.tolist())._asdict(),
        "tokens": _Clips(*of_tokens.tolist())._asdict(),
    }


def _by_length(documents: Documents, score: Score) -> Iterator[dict[str, Any]]:
    """Yield an objective's numbers for documents of each range of lengths."""
    before = 0
    for longest in (*LENGTH_BINS, None):
        chosen = documents.valid & (documents.lengths > before)
        name = f">{before}"
        if longest is not None:
            chosen &= documents.lengths <= longest
            name = f"{before + 1}-{longest}"
        yield {
            "length": name,
            "documents": int(chosen.sum()),
            "tokens": int(documents.lengths[chosen].sum()),
            "gradient": float(score.gradient[chosen].sum()),
            "clip": _clip_shares(documents, score, chosen),
        }
        before = longest or before


def _of_document(documents: Documents, score: Score, document: int) -> dict[str, Any]:
    """Return an objective's numbers for a document: tokens in clipped ratios, by how."""
    clipped_tokens = None
    if score.clipped is not None:
        counts = [int(count) for count in score.clipped[document]]
        clipped_tokens = _Clips(*counts)._asdict()
    ratio = None
    if score.ratio is not None and documents.valid[document]:
        ratio = float(score.ratio[document])
    return {
        "ratio": ratio,
        "clipped_tokens": clipped_tokens,
        "gradient": float(score.gradient[document]),
    }
