"""The file of an optimizer step: what its objective saw, for ``python -m gspo replay``.

A safetensors file: no pickle, readable anywhere. The microbatches of all data-parallel ranks stand
in it one after another as they were trained on, prefixes and padding included. Numbers of documents
and segments are shifted so that they stay unique. A tensor has the name of its field in
:class:`~gspo.types.PackedBatch`; ``new_logps`` are those of the weights that the step's gradient
was taken at. The metadata's entry ``gspo_dump`` is JSON.

Not here: entropies, which the objective takes from logits that are gone; weights; the scoring
(:mod:`gspo.replay`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gspo import __version__
from gspo.config.value_types import is_number, is_whole
from gspo.errors import NO_VALUE, DataError, InputError
from gspo.metrics import Max, Mean, Metric, Metrics, Min, Sum, Time
from gspo.types import Axis, PackedBatch, field_specs

if TYPE_CHECKING:
    from gspo.parallel import ContextAxis
    from gspo.policy import Microbatch, Policy

VERSION = 2

_KEY = "gspo_dump"
_NEW_LOGPS = "new_logps"
_SPECS = field_specs(PackedBatch)
_REDUCTIONS: dict[str, type[Metric]] = {
    "Mean": Mean,
    "Sum": Sum,
    "Max": Max,
    "Min": Min,
    "Time": Time,
}
_METADATA = {
    "step": int,
    "num_documents": int,
    "num_label_tokens": int,
    "seed": int,
    "sampling": dict,
    "config": dict,
    "metrics": dict,
}
# The tensors of a batch that hold fractions, beside log-probabilities.
_FRACTIONS = {"advantages", "rewards", "temperature", "segment_advantages"}
_LARGEST_COUNT = 2**40
_LARGEST_SEGMENT = 2**24  # counting segments takes memory for all numbers up to the largest
_FRACTION_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_GIVE_A_DUMP = "give a file of a run's folder dumps, see dump_every_n_steps"

Sizes = dict[str, int]  # how many of each axis a batch has


@dataclass(frozen=True, slots=True)
class DumpedMicrobatch:
    """A whole microbatch of one data-parallel rank, on the CPU."""

    rank: int
    batch: PackedBatch
    new_logps: Tensor  # [T] float32 nats, 0 outside loss_mask


@dataclass(frozen=True, slots=True)
class Dump:
    """One optimizer step.

    ``metadata`` has ``step``, ``num_documents`` and ``num_label_tokens`` (the totals that the
    denominator is made of, dropped and quarantined documents included), ``sampling``, ``seed``,
    ``config`` (resolved) and ``metrics`` (what the step logs, as far as it is known before the
    weights change).
    """

    microbatches: list[DumpedMicrobatch]
    metadata: dict[str, Any]


def collect(
    policy: Policy, microbatches: list[Microbatch], context: ContextAxis
) -> list[DumpedMicrobatch]:
    """Gather the step's microbatches of all ranks on the first; none elsewhere. Collective.

    The log-probabilities are those under the weights of now: one forward.
    """
    mine = []
    for microbatch in microbatches:
        logps = policy.logps(microbatch)
        collected = microbatch.shard.collect(logps, context)
        new_logps = collected.cpu()
        whole = microbatch.whole(context)
        mine.append((whole, new_logps))
    if context.rank != 0:
        mine.clear()  # the ranks of a context axis have the same
    of_ranks = _gather_on_first(mine)
    dumped = []
    for rank, of_rank in enumerate(of_ranks[:: context.size]):
        for batch, new_logps in of_rank:
            dumped.append(DumpedMicrobatch(rank, batch, new_logps))
    return dumped


def _gather_on_first(value: Any) -> list[Any]:
    """Return each rank's value on the first rank, an empty list elsewhere.

    They go over the CPU's backend, which torch prefers for objects.
    """
    if dist.get_rank() != 0:
        dist.gather_object(value)
        return []
    num_ranks = dist.get_world_size()
    gathered: list[Any] = [None] * num_ranks
    dist.gather_object(value, gathered)
    return gathered


def write(path: Path, dump: Dump) -> None:
    """Write a dump; a file of that name is there whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    batches = []
    new_logps = []
    for microbatch in dump.microbatches:
        batches.append(microbatch.batch)
        new_logps.append(microbatch.new_logps)
    batches = _alike(batches)
    sizes = [_sizes(batch) for batch in batches]
    tensors = {}
    for name in batches[0].tensors():
        tensors[name] = _join(name, batches, sizes)
    tensors[_NEW_LOGPS] = torch.cat(new_logps)
    header = _header(dump, sizes)
    text = json.dumps(header)
    metadata = {_KEY: text}
    # save_file would let no one else read it.
    content = save(tensors, metadata)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _header(dump: Dump, sizes: list[Sizes]) -> dict[str, Any]:
    """Return what stands in the file beside its tensors."""
    rows = []
    for microbatch, of_batch in zip(dump.microbatches, sizes, strict=True):
        plain = _plain_fields(microbatch.batch)
        row = {"rank": microbatch.rank, **of_batch, "fields": plain}
        rows.append(row)
    return {
        "version": VERSION,
        "gspo": __version__,
        **dump.metadata,
        "microbatches": rows,
    }


def _plain_fields(batch: PackedBatch) -> dict[str, Any]:
    """Return the fields that are no tensors, as JSON takes them."""
    plain = {}
    for field in fields(batch):
        name = field.name
        if name not in _SPECS:
            plain[name] = getattr(batch, name)
    stats = {}
    for name, metric in batch.stats.items():
        reduction = type(metric).__name__
        value = float(metric.value)
        weight = float(metric.weight)
        stats[name] = [reduction, value, weight]
    plain["stats"] = stats
    return plain


def _join(name: str, batches: Sequence[PackedBatch], sizes: list[Sizes]) -> Tensor:
    """Return a field of all batches as one tensor, with unique numbers."""
    values = [getattr(batch, name) for batch in batches]
    spec = _SPECS[name]
    if spec.numbers is not None:
        starts = _starts(spec.numbers, sizes)
        for i, start in enumerate(starts):
            values[i] = values[i] + start
    return torch.cat(values)


def _starts(axis: Axis, sizes: list[Sizes]) -> list[int]:
    """Return the first number that each microbatch has in the file."""
    starts = []
    total = 0
    for of_batch in sizes:
        starts.append(total)
        total += of_batch[axis]
    return starts


def _alike(batches: list[PackedBatch]) -> list[PackedBatch]:
    """Give every batch the tensors that some have: no prefixes, a segment for each document."""
    names: set[str] = set()
    for batch in batches:
        names |= batch.tensors().keys()
    filled = []
    for batch in batches:
        present = batch.tensors().keys()
        added = {}
        for name, default in _defaults(batch).items():
            if name in names and name not in present:
                added[name] = default
        filled.append(replace(batch, **added))
    return filled


def _defaults(batch: PackedBatch) -> dict[str, Any]:
    """Return tensors that say what their absence does."""
    num_documents = batch.label_counts.numel()
    advantages = batch.advantages
    if batch.segment_index is not None:
        advantages = _segment_advantages(batch, batch.segment_index)
    return {
        "prefix_index": torch.arange(num_documents),
        "segment_index": batch.document_index,
        "segment_advantages": advantages,
    }


def _segment_advantages(batch: PackedBatch, segment_index: Tensor) -> Tensor:  # [K]
    """Return the advantage of each segment's document."""
    segment = segment_index[batch.loss_mask]
    document = batch.document_index[batch.loss_mask]
    num_segments = _largest(segment_index) + 1
    zeros = batch.advantages.new_zeros(num_segments)
    advantages = batch.advantages[document]
    return zeros.index_put((segment,), advantages)


def _sizes(batch: PackedBatch) -> Sizes:
    """Count each axis of a batch.

    Segments are those of its advantages, or else those that its index names.
    """
    num_segments = 0
    if batch.segment_advantages is not None:
        num_segments = batch.segment_advantages.numel()
    elif batch.segment_index is not None:
        num_segments = _largest(batch.segment_index) + 1
    return {
        Axis.SLOT: batch.tokens.numel(),
        Axis.DOCUMENT: batch.label_counts.numel(),
        Axis.SEGMENT: num_segments,
    }


def _largest(values: Tensor) -> int:
    return int(values.max())


def read(path: Path) -> Dump:
    """Read the dump in a file.

    Raises:
        InputError: There is none, it is not whole, or another version has written it.
    """
    header, tensors = _read_file(path)
    try:
        metadata = _read_header(path, header)
        rows = metadata.pop("microbatches")
        microbatches = _split(tensors, rows)
        _check_totals(microbatches, metadata)
        return Dump(microbatches, metadata)
    except InputError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        problem = f"is damaged: {error!r}"
        raise DataError(str(path), NO_VALUE, problem, "dump the step again") from error


def _read_file(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """Return the header, None if the file has none, and the tensors by name."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():
                tensors[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        problem = f"cannot be read: {error}"
        remedy = "give a whole file of a run's folder dumps, see dump_every_n_steps"
        raise DataError(str(path), NO_VALUE, problem, remedy) from error
    return metadata.get(_KEY), tensors


def _read_header(path: Path, header: str | None) -> dict[str, Any]:
    if header is None:
        raise DataError(str(path), NO_VALUE, "is not a dump of a step", _GIVE_A_DUMP)
    metadata = json.loads(header)
    version = metadata["version"]
    writer = metadata["gspo"]
    if version != VERSION:
        raise DataError(
            str(path),
            NO_VALUE,
            f"is a dump of version {version}, and this gspo reads version {VERSION}",
            f"replay it with gspo {writer}, which wrote it",
        )
    for key, kind in _METADATA.items():
        value = metadata[key]
        is_right = is_whole(value, 0, _LARGEST_COUNT) if kind is int else isinstance(value, kind)
        if not is_right:
            raise ValueError(f"{key} is {value!r}")
    for name, value in metadata["metrics"].items():
        if not is_number(value):
            raise ValueError(f"the metric {name} is {value!r}")
    return metadata


def _split(tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> list[DumpedMicrobatch]:
    """Cut the file's tensors into microbatches."""
    pieces: list[dict[str, Any]] = [{} for _ in rows]  # each row's tensors by name
    for name, values in tensors.items():
        for piece, part in zip(pieces, _cut(name, values, rows), strict=True):
            piece[name] = part
    microbatches = []
    for piece, row in zip(pieces, rows, strict=True):
        new_logps = piece.pop(_NEW_LOGPS)
        _drop_own_prefixes(piece)
        plain = _read_fields(row["fields"])
        batch = PackedBatch(**piece, **plain)
        _check(batch, new_logps)
        rank = row["rank"]
        microbatch = DumpedMicrobatch(rank, batch, new_logps)
        microbatches.append(microbatch)
    return microbatches


def _cut(name: str, values: Tensor, rows: list[dict[str, Any]]) -> list[Tensor]:
    """Return a file's tensor in parts, one for each row."""
    spec = _SPECS.get(name)
    axis = Axis.SLOT if spec is None else spec.axis
    lengths = [row[axis] for row in rows]
    pieces = list(values.split(lengths))
    if spec is not None and spec.numbers is not None:
        starts = _starts(spec.numbers, rows)
        for i, start in enumerate(starts):
            pieces[i] = pieces[i] - start
    return pieces


def _drop_own_prefixes(values: dict[str, Any]) -> None:
    """Remove prefixes that another microbatch has and this one does not."""
    prefixes = values.get("prefix_index")
    if prefixes is None:
        return
    documents = torch.arange(prefixes.numel())
    if torch.equal(prefixes, documents):
        del values["prefix_index"]


def _read_fields(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are no tensors, as a batch has them."""
    stats: Metrics = {}
    for name, (reduction, value, weight) in plain["stats"].items():
        metric = _REDUCTIONS[reduction]
        stats[name] = metric(value, weight)
    ids = []
    for prompt_id, group_id in plain["ids"]:
        if not isinstance(prompt_id, str) or type(group_id) is not int:
            raise ValueError(f"ids has {prompt_id!r}, {group_id!r}")
        ids.append((prompt_id, group_id))
    return plain | {"stats": stats, "ids": ids}


def _check(batch: PackedBatch, new_logps: Tensor) -> None:
    """Check what the scoring relies on.

    Raises:
        ValueError: It does not hold.
    """
    _check_dtypes(batch, new_logps)
    sizes = _sizes(batch)
    num_bins = batch.num_bins
    if not is_whole(num_bins, 1) or sizes[Axis.SLOT] % num_bins:
        raise ValueError(f"num_bins is {num_bins!r}")
    for name, values in batch.tensors().items():
        spec = _SPECS[name]
        axis = spec.numbers
        if axis is None:
            continue
        count = min(sizes[axis], _LARGEST_SEGMENT)
        if not _are_numbers(values, count):
            raise ValueError(f"{name} has a number beyond its {count} {axis}")
    num_documents = sizes[Axis.DOCUMENT]
    labelled = batch.document_index[batch.loss_mask]
    counts = torch.bincount(labelled, minlength=num_documents)
    if not torch.equal(counts, batch.label_counts):
        raise ValueError("label_counts are not those of loss_mask")

    num_sampled = len(batch.ids)
    is_sampled = torch.arange(num_documents) < num_sampled
    if num_sampled > num_documents or not torch.equal(batch.label_counts > 0, is_sampled):
        raise ValueError(f"there are {num_sampled} ids for other documents than those with labels")


def _check_totals(microbatches: list[DumpedMicrobatch], metadata: dict[str, Any]) -> None:
    """Check that the denominators count the documents that are there, and their tokens."""
    num_documents = num_label_tokens = 0
    for microbatch in microbatches:
        num_documents += len(microbatch.batch.ids)
        num_label_tokens += int(microbatch.batch.label_counts.sum())
    for key, least in (("num_documents", num_documents), ("num_label_tokens", num_label_tokens)):
        if metadata[key] < least:
            raise ValueError(f"{key} is {metadata[key]}, and the file has {least}")


def _check_dtypes(batch: PackedBatch, new_logps: Tensor) -> None:
    """Check that tensors hold fractions, booleans or whole numbers as a batch has them."""
    for name, values in {**batch.tensors(), _NEW_LOGPS: new_logps}.items():
        spec = _SPECS.get(name)
        has_fractions = spec is None or spec.logps or name in _FRACTIONS
        needed = torch.bool if name == "loss_mask" else torch.int64
        is_right = values.dtype in _FRACTION_DTYPES if has_fractions else values.dtype == needed
        if not is_right:
            raise ValueError(f"{name} is {values.dtype}")


def _are_numbers(values: Tensor, count: int) -> bool:
    """Whether all values lie in [0, count)."""
    if not values.numel():
        return True
    smallest = int(values.min())
    largest = _largest(values)
    return smallest >= 0 and largest < count
