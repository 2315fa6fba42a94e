"""Score a dumped step under any objective, on a CPU and without the model.

The log-probabilities are those of the file, so the losses of :mod:`gspo.losses` run as they did in
training, a microbatch at a time, and autograd gives the gradient by each log-probability.
Advantages are those of the run, whatever estimator a preset has.

Not here: the gradient of the weights, and an entropy bonus, since a dump has no entropies; the
command line (:mod:`gspo.commands.replay`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from gspo.losses.checked import checked_output, denominator_of
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
_MAX_DEPTH = 20  # of a dump's config; a run's has four
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
        of_preset = PRESETS[preset].config
        keys["loss"] = dict(of_preset["loss"])
    with refusals("overrides", "write key=value, as loss.clip_high=0.3"):
        defaults = argparse.Namespace(**keys)
        cfg = merge_overrides(defaults, overrides)
        merged = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(merged, dict)
    section = merged["loss"]
    problems = list(component_problems({"loss": section}, {}))
    if problems:
        raise InputErrors(problems)
    return section


def _keys_of_file(run: dict[str, Any], overrides: Sequence[str] | None) -> dict[str, Any]:
    """Return the keys that presets refer to, and the loss where there are ``overrides`` for it.

    Raises:
        InputError: One is absent, or is more than data.
    """
    needed = {"loss", "advantages", *_CONTEXT}
    absent = sorted(needed - run.keys())
    names = ", ".join(absent)
    require(not absent, "config", sorted(run), f"of the file lacks {names}", _DUMP_AGAIN)
    advantages = run["advantages"]
    has_estimator = isinstance(advantages, dict) and isinstance(advantages.get("estimator"), str)
    must = "of the file has no estimator"
    require(has_estimator, "config.advantages", advantages, must, _DUMP_AGAIN)
    keys: dict[str, Any] = {name: run[name] for name in _CONTEXT}
    if overrides is not None:
        keys["loss"] = _loss_in_file(run["loss"], overrides)
    _check_plain(keys)
    return keys


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        assignment = override.lstrip("~")
        key, _, value = assignment.partition("=")
        section, _, _ = key.partition(".")
        if "???" in value:  # the merge would leave the key as it is
            problem = "has the mark for a missing value"
            raise InputError(key, value, problem, "give a value, or leave it out")
        require(
            section == "loss",
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
    is_section = isinstance(loss, dict)
    named = loss.get("_component_") if is_section else None
    is_replaced = False
    for override in overrides:
        if override.startswith(("loss=", "loss._component_=")):
            is_replaced = True
    is_known = named in known
    require(
        is_section and (is_known or is_replaced),
        "config.loss._component_",
        named,
        "of the file is no objective of gspo.losses, and a file may not name code that is run",
        "name your own loss on the command line: loss._component_=my_losses.MyLoss",
    )
    return dict(loss)


def _check_plain(values: Any, key: str = "config", depth: int = 0) -> None:
    """Refuse what is more than data in a file's config.

    Raises:
        InputError: An interpolation, a component inside another's arguments, or a nesting that the
            libraries which read it on would fail at.
    """
    is_flat = depth <= _MAX_DEPTH
    require(is_flat, key, values, f"is nested more than {_MAX_DEPTH} deep", _DUMP_AGAIN)
    if isinstance(values, dict):
        for name, value in values.items():
            inner_key = f"{key}.{name}"
            is_nested = name == "_component_" and key != "config.loss"
            require(not is_nested, inner_key, value, "may not stand in a file", _DUMP_AGAIN)
            _check_plain(value, inner_key, depth + 1)
    elif isinstance(values, list):
        for number, value in enumerate(values):
            _check_plain(value, f"{key}.{number}", depth + 1)
    elif isinstance(values, str):
        is_text = "${" not in values
        problem = "has an interpolation, which a dump never has"
        require(is_text, key, values, problem, _DUMP_AGAIN)


def find_documents(dump: Dump) -> Documents:
    """Return the sampled documents, without prefixes and padding."""
    rows: list[dict[str, Any]] = []
    for microbatch in dump.microbatches:
        rows += _document_rows(microbatch)
    lengths = []
    valid = []
    for row in rows:
        lengths.append(row["length"])
        valid.append(not row["not_finite"])
    return Documents(
        rows=rows,
        lengths=torch.tensor(lengths, dtype=torch.int64),
        valid=torch.tensor(valid, dtype=torch.bool),
    )


def _document_rows(microbatch: DumpedMicrobatch) -> Iterator[dict[str, Any]]:
    batch = microbatch.batch
    flags = _not_finite(microbatch)
    log_ratio = microbatch.new_logps - batch.old_logps
    mean_log_ratios = _means(log_ratio, batch)
    advantages = batch.advantages
    if batch.token_advantages is not None:  # those of segments, by their tokens
        advantages = _means(batch.token_advantages, batch)
    for document, (prompt_id, group_id) in enumerate(batch.ids):
        not_finite = [name for name, of_documents in flags.items() if of_documents[document]]
        yield {
            "prompt_id": prompt_id,
            "group_id": group_id,
            "rank": microbatch.rank,
            "policy_version": int(batch.policy_version[document]),
            "length": int(batch.label_counts[document]),
            "advantage": float(advantages[document]),
            "reward": float(batch.rewards[document]),
            "mean_log_ratio": float(mean_log_ratios[document]),
            "not_finite": not_finite,
        }


def _not_finite(microbatch: DumpedMicrobatch) -> dict[str, Tensor]:  # name -> [D] bool
    """Return which documents have a value that is not finite, by the name of the value."""
    batch = microbatch.batch
    specs = field_specs(PackedBatch)
    values = {"new_logps": microbatch.new_logps}
    for name, tensor in batch.tensors(Axis.SLOT).items():
        if specs[name].logps:
            values[name] = tensor
    if batch.token_advantages is not None:
        values["token_advantages"] = batch.token_advantages
    flags = {}
    for name, of_slots in values.items():
        is_bad = ~of_slots.isfinite() & batch.loss_mask
        num_bad = _sums(is_bad, batch)
        flags[name] = num_bad > 0
    flags["advantage"] = ~batch.advantages.isfinite()
    return flags


def _sums(values: Tensor, batch: PackedBatch) -> Tensor:  # [T] -> [D] float64
    """Add up values over each document's slots."""
    num_documents = batch.label_counts.numel()
    return sums_at(values.double(), batch.document_index, num_documents)


def _means(values: Tensor, batch: PackedBatch) -> Tensor:  # [T] -> [D] float64
    """Average values over each document's labelled tokens."""
    picked = torch.where(batch.loss_mask, values, 0.0)
    sums = _sums(picked, batch)
    return per_label(sums, batch.label_counts)


def score(dump: Dump, preset: str | None = None, overrides: Sequence[str] = ()) -> Score:
    """Score the dump under an objective, see :func:`loss_section`.

    Raises:
        InputError: The loss refuses its arguments, or needs what the dump does not have.
    """
    run = dump.metadata["config"]
    section = loss_section(run, preset, overrides)
    with refusals("loss"):
        node = OmegaConf.create(section)
        loss = config.instantiate(node)
    _check_needs(loss, section, dump)
    surrogates = _listen(loss)
    backwards = [_backward(loss, microbatch) for microbatch in dump.microbatches]
    totals = _Totals.of(loss, dump, backwards)
    plain = Score(
        name=" ".join((preset or "run", *overrides)),
        loss=section,
        advantages=None if preset is None else _estimator(PRESETS[preset].config),
        denominator=totals.denominator,
        metrics=totals.metrics,
        gradient=_gradient_shares(backwards),
        clipped=None,
        ratio=None,
    )
    if not surrogates:
        return plain
    clipped = _all_clipped(surrogates, dump)
    return replace(plain, clipped=clipped.tokens, ratio=clipped.ratio)


def _estimator(cfg: Mapping[str, Any]) -> str:
    """Return the estimator of advantages that a config has."""
    section = cfg["advantages"]
    return section["estimator"]


def _check_needs(loss: Any, section: dict[str, Any], dump: Dump) -> None:
    """Refuse an option that needs an input which the dump does not have."""
    traits = traits_of(loss)
    for option, needed in traits.needs.items():
        for microbatch in dump.microbatches:
            values = getattr(microbatch.batch, needed, None)
            require(
                values is not None,
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
    inputs = row_inputs(whole, None)
    result = loss(logps, entropy, inputs)
    output = checked_output(loss, result, needs_gradient=True)
    (gradient,) = torch.autograd.grad(output.loss, logps, materialize_grads=True)
    zeros = torch.zeros_like(microbatch.new_logps)
    of_slots = zeros.index_put((rows,), gradient)
    of_documents = _sums(of_slots.abs(), batch)
    num_sampled = len(batch.ids)
    detached = output._replace(loss=output.loss.detach())
    return _Backward(detached, of_documents[:num_sampled])


def _whole_microbatch(batch: PackedBatch) -> Microbatch:
    """Return what an objective's inputs are taken from."""
    rows = batch.loss_mask.nonzero().squeeze(-1)
    with refusals("segment_index", _DUMP_AGAIN):
        segments = batch_segments(batch, batch, rows, _CPU)
    return Microbatch(
        shard=split(batch, None),
        batch=batch,
        label_rows=rows,
        label_counts=batch.label_counts.tolist(),
        counted=None,
        segments=segments,
    )


def _gradient_shares(backwards: list[_Backward]) -> Tensor:  # [D]
    gradient = torch.cat([backward.document_gradient for backward in backwards])
    smallest = torch.finfo(torch.float64).tiny
    total = gradient.sum().clamp(min=smallest)
    return gradient / total


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
        not_finite = step.not_finite
        num_documents = dump.metadata["num_documents"] - int(not_finite.documents)
        num_label_tokens = dump.metadata["num_label_tokens"] - int(not_finite.tokens)
        denominator = denominator_of(loss, num_documents, num_label_tokens)
        shares = []
        for backward in backwards:
            share = backward.output.loss / denominator
            shares.append(float(share))
        metrics["loss"] = sum(shares)
        shown = public(metrics)
        shown.pop("entropy", None)  # a dump has none
        in_order = sorted(shown.items())
        return cls(denominator, dict(in_order))


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
    if not isinstance(objective, partial):
        return calls
    surrogate = objective.keywords.get("surrogate")
    if surrogate is None:
        return calls

    def listening(terms: RatioTerms) -> SurrogateTerms:
        result = surrogate(terms)
        call = _Surrogate(terms, result)
        calls.append(call)
        return result

    loss.objective = partial(objective, surrogate=listening)
    return calls


class _Clipped(NamedTuple):
    """The effect of the clip on documents."""

    tokens: Tensor  # [D, 6] in clipped ratios, see _Clips
    ratio: Tensor  # [D] mean over the document's tokens


def _all_clipped(surrogates: list[_Surrogate], dump: Dump) -> _Clipped:
    tokens = []
    ratios = []
    for surrogate, microbatch in zip(surrogates, dump.microbatches, strict=True):
        clipped = _clipped(surrogate, microbatch.batch)
        tokens.append(clipped.tokens)
        ratios.append(clipped.ratio)
    return _Clipped(torch.cat(tokens), torch.cat(ratios))


def _clipped(surrogate: _Surrogate, batch: PackedBatch) -> _Clipped:
    """Count tokens in clipped ratios, and average ratios, of each sampled document."""
    units = surrogate.terms.units
    clips = surrogate.result
    log_ratio = surrogate.terms.log_ratio.detach()
    flags = _Clips(
        any=clips.outside,
        any_low=clips.outside & (log_ratio < 0),
        any_high=clips.outside & (log_ratio > 0),
        binding=clips.low | clips.high,
        binding_low=clips.low,
        binding_high=clips.high,
    )
    ratio = log_ratio.double().exp()
    of_units = torch.stack(flags).double()
    values = torch.cat((of_units, ratio[None]))
    picked = torch.where(units.valid, values * units.num_tokens, 0.0)
    num_documents = batch.label_counts.numel()
    num_sampled = len(batch.ids)
    totals = sums_at(picked, units.document, num_documents)[:, :num_sampled]
    tokens = totals[:-1].T
    label_counts = batch.label_counts[:num_sampled]
    return _Clipped(tokens, per_label(totals[-1], label_counts))


def result(
    file: Path, dump: Dump, documents: Documents, scores: list[Score], top: int
) -> dict[str, Any]:
    """Return what ``--json`` writes.

    It has the dump, each objective, and the ``top`` documents by the first one's gradient share.
    """
    metadata = dump.metadata
    estimator = _estimator(metadata["config"])
    quarantined = [row for row in documents.rows if row["not_finite"]]
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
        "quarantined": quarantined,
        "objectives": [_of_objective(documents, score, estimator) for score in scores],
        "documents": list(_top_rows(documents, scores, top)),
    }


def _top_rows(documents: Documents, scores: list[Score], top: int) -> Iterator[dict[str, Any]]:
    first = scores[0]
    order = first.gradient.argsort(descending=True, stable=True)
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
    num_documents = max(len(tokens), 1)
    is_clipped = tokens > 0
    of_documents = is_clipped.sum(0) / num_documents
    of_tokens = tokens.sum(0) / num_tokens
    return {
        "documents": _by_clip(of_documents.tolist()),
        "tokens": _by_clip(of_tokens.tolist()),
    }


def _by_clip(values: list[Any]) -> dict[str, Any]:
    """Name six values by how a ratio is clipped."""
    clips = _Clips(*values)
    return clips._asdict()


def _by_length(documents: Documents, score: Score) -> Iterator[dict[str, Any]]:
    """Yield an objective's numbers for documents of each range of lengths."""
    before = 0
    for longest in (*LENGTH_BINS, None):
        chosen = documents.valid & (documents.lengths > before)
        name = f">{before}"
        if longest is not None:
            chosen &= documents.lengths <= longest
            name = f"{before + 1}-{longest}"
        lengths = documents.lengths[chosen]
        shares = score.gradient[chosen]
        yield {
            "length": name,
            "documents": int(chosen.sum()),
            "tokens": int(lengths.sum()),
            "gradient": float(shares.sum()),
            "clip": _clip_shares(documents, score, chosen),
        }
        before = longest or before


def _of_document(documents: Documents, score: Score, document: int) -> dict[str, Any]:
    """Return an objective's numbers for a document: tokens in clipped ratios, by how."""
    clipped_tokens = None
    if score.clipped is not None:
        counts = [int(count) for count in score.clipped[document]]
        clipped_tokens = _by_clip(counts)
    ratio = None
    if score.ratio is not None and documents.valid[document]:
        ratio = float(score.ratio[document])
    return {
        "ratio": ratio,
        "clipped_tokens": clipped_tokens,
        "gradient": float(score.gradient[document]),
    }
