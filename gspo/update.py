"""The parts of an optimizer step as plain functions, for recipes, benchmarks and the planner.

What happens at a value that is not finite: a document with one leaves the loss in the forward, and
:func:`take_out` takes it out of the denominators; a gradient whose norm is not finite skips the
step (:func:`step_if_finite`), on all ranks alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchtune import training

from gspo.data.steps import StepBatches
from gspo.errors import DataError, InputError
from gspo.losses import checked
from gspo.losses.inputs import LossOutput
from gspo.metrics import METRICS, Metrics, NotFinite, Sum
from gspo.parallel.context import ContextAxis
from gspo.parallel.mesh import Ranks
from gspo.policy.microbatch import Microbatch
from gspo.policy.model import Policy
from gspo.policy.sharding import check_weights
from gspo.types import PackedBatch, field_specs

# How the names begin that the shipped losses give. A loss of the user's own may give them too.
_OF_LOSSES = (
    *("ratio/", "log_ratio/", "mismatch/", "correction/", "clip/"),
    *("kl_", "entropy", "new_logps", "old_logps", "bounded_documents"),
)
# Names in a row of metrics.jsonl that no metric of a loss may take, and how others begin: the
# recipe gives them. Beside its own value a loss's would be added in silence.
RESERVED_METRICS = {
    *(name for name in METRICS if not name.startswith(_OF_LOSSES)),
    *("step", "_slots", "_reward_sq", "clip/at_zero_drift"),
}
_RESERVED_SECTIONS = ("reward/", "eval/", "time/")


def check_versions(batch: PackedBatch, version: int) -> None:
    """Refuse a completion of weights that do not exist yet, whose staleness would be negative.

    Args:
        batch: about to be trained on.
        version: the newest that the sampler was given.

    Raises:
        DataError: It names the prompt and both versions.
    """
    is_ahead = (batch.policy_version > version) & (batch.label_counts > 0)
    if not is_ahead.any():
        return
    document = int(is_ahead.nonzero()[0])
    prompt_id, _ = batch.ids[document]
    raise DataError(
        f"a completion of prompt {prompt_id}",
        must=f"policy_version is {int(batch.policy_version[document])}, needed: at most {version}, "
        "the newest that the sampler was given",
        remedy="a sampler must give the version that its update was called with",
    )


def denominator_of(policy: Policy, num_documents: int, num_label_tokens: int) -> float:
    """Return what the loss sum of a step is divided by; 1 when nothing is left.

    Raises:
        InputError: The loss states no number above 0.
    """
    assert policy.loss is not None
    return checked.denominator_of(policy.loss, num_documents, num_label_tokens)


def accumulate_gradients(
    policy: Policy,
    microbatches: list[Microbatch],
    denominator: float,
    *,
    reduce_every_microbatch: bool = True,
) -> Iterator[LossOutput]:
    """Run the backwards of a step, for the gradient of ``loss sum over all ranks / denominator``.

    Args:
        policy: sharded, without gradients or with some to add to.
        microbatches: as many on every rank.
        denominator: from the totals of the whole step over all ranks, see :func:`denominator_of`.
        reduce_every_microbatch: False adds up unsharded gradients and reduces them once, in the
            last backward: fewer collectives for the memory of a full gradient on every rank.

    Yields:
        The output of each microbatch, detached, with ``loss`` among its metrics.

    Raises:
        InputError: A metric of the loss has a name that is reserved.
    """
    # FSDP2 averages gradients over the ranks; a sum over documents needs them added up.
    scale = dist.get_world_size() / denominator
    last = len(microbatches) - 1
    for i, microbatch in enumerate(microbatches):
        reduces = reduce_every_microbatch or i == last
        policy.set_requires_gradient_sync(reduces)
        output = policy(microbatch)
        metrics = _own_metrics(policy.loss, output)
        scaled = output.loss * scale
        scaled.backward()
        loss = output.loss.detach()
        metrics["loss"] = Sum(loss / denominator)
        yield LossOutput(loss, metrics, output.not_finite)


def _own_metrics(loss: Any, output: LossOutput) -> Metrics:
    """Return the metrics of a loss, without a name that is the recipe's."""
    metrics = dict(output.metrics)
    if output.not_finite is not None:
        metrics["quarantined_documents"] = Sum(output.not_finite.documents)
    for name in metrics:
        is_taken = name in RESERVED_METRICS or name.startswith(_RESERVED_SECTIONS)
        is_count = name == "quarantined_documents" and output.not_finite is not None
        if is_taken and not is_count:
            raise InputError(
                "loss",
                checked.name_of(loss),
                f"gives a metric named {name!r}, which in metrics.jsonl is the recipe's own",
                f"give it another name, e.g. own/{name.rpartition('/')[2]}",
            )
    return metrics


def take_out(policy: Policy, not_finite: NotFinite, step: StepBatches, denominator: float) -> float:
    """Take documents that were found not finite in the forward out of the denominator.

    Every objective is linear in 1 / denominator, so the gradients are scaled.

    Args:
        policy: with the gradients of the step.
        not_finite: how many, over all ranks.
        step: has the totals that ``denominator`` was made of.
        denominator: under which the backwards ran.

    Returns:
        The factor by which gradients and loss grow.
    """
    num_documents = step.num_documents - int(not_finite.documents)
    num_label_tokens = step.num_label_tokens - int(not_finite.tokens)
    remaining = denominator_of(policy, num_documents, num_label_tokens)
    factor = denominator / remaining
    device = next(policy.parameters()).device
    training.scale_grads(policy, torch.tensor(factor, device=device))
    return factor


def clip_gradients(policy: Policy, max_norm: float | None) -> float:
    """Scale the gradients down to a norm of ``max_norm``; None leaves them. Collective.

    Returns:
        The norm before, over all ranks.
    """
    bound = math.inf if max_norm is None else max_norm
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), bound)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm)


def seed_rounding(seed: int, step: int, ranks: Ranks) -> None:
    """Seed the stochastic rounding of a step.

    Replicas of a shard must round alike, and shards each by themselves.

    Args:
        seed: of the run.
        step: optimizer steps done before.
        ranks: of the run.
    """
    draw = step * ranks.num_shards + ranks.shard_index
    torch.manual_seed(seed + draw)


def step_if_finite(optimizer: Optimizer, grad_norm: float) -> bool:
    """Apply the gradients unless their norm is not finite; then drop them.

    Returns:
        Whether the weights have moved; the same on all ranks, as the norm is.
    """
    is_finite = math.isfinite(grad_norm)
    if is_finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return is_finite


def check_moved_weights(policy: Policy, step: int) -> None:
    """Refuse weights that a step has made infinite or NaN. Collective.

    Args:
        policy: after the step.
        step: its number, from 1.

    Raises:
        InputError: On every rank; it names the first such parameter.
    """
    device = next(policy.parameters()).device
    remedy = "lower it, or set clip_grad_norm"
    check_weights(policy, device, "optimizer.lr", f"after step {step}", remedy)


@dataclass(frozen=True, slots=True)
class QuarantinedDocument:
    """A document with a value that is not finite. Numbers are texts: JSON has no infinity."""

    prompt_id: str
    group_id: int
    cause: str  # the first of its values that is not finite
    tokens: list[int]  # of the completion
    values: dict[str, Any]


def find_not_finite(
    policy: Policy, microbatch: Microbatch, context: ContextAxis
) -> dict[int, QuarantinedDocument]:
    """Return the documents of a microbatch with a value that is not finite, by number.

    Collective; the same on all ranks of the context axis.
    """
    logps = microbatch.shard.collect(policy.logps(microbatch), context)
    return not_finite_documents(microbatch.whole(context), logps.cpu())


def not_finite_documents(
    batch: PackedBatch,
    logps: Tensor,  # [T]
) -> dict[int, QuarantinedDocument]:
    """Return the documents of a batch with a value that is not finite, by number.

    Args:
        batch: whole, on the CPU.
        logps: of its labels, nats.
    """
    columns = {"logps": logps}
    for name, spec in field_specs(PackedBatch).items():
        column = getattr(batch, name)
        if spec.logps and column is not None:
            columns[name] = column
    if batch.token_advantages is not None:
        columns["token_advantages"] = batch.token_advantages
    total = torch.stack(list(columns.values())).sum(0)
    is_bad = ~total.isfinite() & batch.loss_mask
    documents = {}
    for number in batch.document_index[is_bad].unique().tolist():
        documents[number] = _describe(batch, columns, number)
    return documents


def _describe(batch: PackedBatch, columns: dict[str, Tensor], document: int) -> QuarantinedDocument:
    rows = (batch.document_index == document) & batch.loss_mask
    values: dict[str, Any] = {"advantage": repr(float(batch.advantages[document]))}
    cause = ""
    for name, column in columns.items():
        in_document = column[rows]
        values[name] = [repr(value) for value in in_document.tolist()]
        if not cause and not in_document.isfinite().all():
            cause = name
    prompt_id, group_id = batch.ids[document]
    tokens = batch.labels[rows].tolist()
    return QuarantinedDocument(prompt_id, group_id, cause, tokens, values)
