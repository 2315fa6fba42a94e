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
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gspo import __version__
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
_REDUCTIONS: dict[str, type[Metric]] = {kind.__name__: kind for kind in (Mean, Sum, Max, Min, Time)}
_METADATA = {
    "step": int,
    "num_documents": int,
    "num_label_tokens": int,
    "seed": int,
    "sampling": dict,
    "config": dict,
    "metrics": dict,
}
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
        new_logps = microbatch.shard.collect(policy.logps(microbatch), context).cpu()
        mine.append((microbatch.whole(context), new_logps))
    is_first = dist.get_rank() == 0
    ranks: list[Any] = [None] * dist.get_world_size()
    # Over the CPU's backend, which torch prefers for objects; the ranks of a context axis have the
    # same.
    dist.gather_object(mine if context.rank == 0 else [], ranks if is_first else None)
    if not is_first:
        return []
    dumped = []
    for rank, of_rank in enumerate(ranks[:: context.size]):
        for batch, new_logps in of_rank:
            dumped.append(DumpedMicrobatch(rank, batch, new_logps))
    return dumped


def write(path: Path, dump: Dump) -> None:
    """Write a dump; a file of that name is there whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    batches = _alike([microbatch.batch for microbatch in dump.microbatches])
    sizes = [_sizes(batch) for batch in batches]
    tensors = {}
    for name in batches[0].tensors():
        tensors[name] = _join(name, batches, sizes)
    tensors[_NEW_LOGPS] = torch.cat([microbatch.new_logps for microbatch in dump.microbatches])
    header = json.dumps(_header(dump, sizes))
    temporary = path.with_name(f"{path.name}.tmp")
    # save_file would let no one else read it.
    temporary.write_bytes(save(tensors, {_KEY: header}))
    temporary.replace(path)


def _header(dump: Dump, sizes: list[Sizes]) -> dict[str, Any]:
    """Return what stands in the file beside its tensors."""
    rows = []
    for microbatch, of_batch in zip(dump.microbatches, sizes, strict=True):
        plain = _plain_fields(microbatch.batch)
        rows.append({"rank": microbatch.rank, **of_batch, "fields": plain})
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
        if field.name not in _SPECS:
            plain[field.name] = getattr(batch, field.name)
    stats = {}
    for name, metric in batch.stats.items():
        stats[name] = [type(metric).__name__, float(metric.value), float(metric.weight)]
    return plain | {"stats": stats}


def _join(name: str, batches: Sequence[PackedBatch], sizes: list[Sizes]) -> Tensor:
    values = [getattr(batch, name) for batch in batches]
    numbers = _SPECS[name].numbers
    if numbers is not None:
        starts = _starts(numbers, sizes)
        values = [x + start for x, start in zip(values, starts, strict=True)]
    return torch.cat(values)


def _starts(axis: Axis, sizes: list[Sizes]) -> list[int]:
    """Return the first number that each microbatch has in the file."""
    counts = [of_batch[axis] for of_batch in sizes]
    return list(accumulate(counts[:-1], initial=0))


def _alike(batches: list[PackedBatch]) -> list[PackedBatch]:
    """Give every batch the tensors that some have: no prefixes, a segment for each document."""
    names: set[str] = set()
    for batch in batches:
        names |= batch.tensors().keys()
    filled = []
    for batch in batches:
        defaults = _defaults(batch)
        absent = names & defaults.keys() - batch.tensors().keys()
        added = {name: defaults[name] for name in absent}
        filled.append(replace(batch, **added))
    return filled


def _defaults(batch: PackedBatch) -> dict[str, Any]:
    """Return tensors that say what their absence does."""
    advantages = batch.advantages
    if batch.segment_index is not None:
        advantages = _segment_advantages(batch, batch.segment_index)
    return {
        "prefix_index": torch.arange(batch.label_counts.numel()),
        "segment_index": batch.document_index,
        "segment_advantages": advantages,
    }


def _segment_advantages(batch: PackedBatch, segment_index: Tensor) -> Tensor:  # [K]
    """Return the advantage of each segment's document."""
    index = segment_index[batch.loss_mask]
    document = batch.document_index[batch.loss_mask]
    advantages = batch.advantages.new_zeros(int(segment_index.max()) + 1)
    return advantages.index_put((index,), batch.advantages[document])


def _sizes(batch: PackedBatch) -> Sizes:
    """Count each axis of a batch.

    Segments are those of its advantages, or else those that its index names.
    """
    num_segments = 0
    if batch.segment_advantages is not None:
        num_segments = batch.segment_advantages.numel()
    elif batch.segment_index is not None:
        num_segments = int(batch.segment_index.max()) + 1
    return {
        Axis.SLOT: batch.tokens.numel(),
        Axis.DOCUMENT: batch.label_counts.numel(),
        Axis.SEGMENT: num_segments,
    }


def read(path: Path) -> Dump:
    """Read the dump in a file.

    Raises:
        InputError: There is none, it is not whole, or another version has written it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        remedy = "give a whole file of a run's folder dumps, see dump_every_n_steps"
        raise DataError(str(path), NO_VALUE, f"cannot be read: {error}", remedy) from error
    try:
        metadata = _read_header(path, header)
        return Dump(_split(tensors, metadata.pop("microbatches")), metadata)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        problem = f"is damaged: {error!r}"
        raise DataError(str(path), NO_VALUE, problem, "dump the step again") from error


def _read_header(path: Path, header: str | None) -> dict[str, Any]:
    if header is None:
        raise DataError(str(path), NO_VALUE, "is not a dump of a step", _GIVE_A_DUMP)
    metadata = json.loads(header)
    version, writer = metadata["version"], metadata["gspo"]
    if version != VERSION:
        raise DataError(
            str(path),
            NO_VALUE,
            f"is a dump of version {version}, and this gspo reads version {VERSION}",
            f"replay it with gspo {writer}, which wrote it",
        )
    for key, kind in _METADATA.items():
        if not isinstance(metadata[key], kind):
            raise ValueError(f"{key} is {metadata[key]!r}")
    return metadata


def _split(tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> list[DumpedMicrobatch]:
    """Cut the file's tensors into microbatches."""
    pieces = {name: _cut(name, values, rows) for name, values in tensors.items()}
    microbatches = []
    for i, row in enumerate(rows):
        values = {name: of_rows[i] for name, of_rows in pieces.items()}
        new_logps = values.pop(_NEW_LOGPS)
        plain = _read_fields(row["fields"])
        batch = PackedBatch(**_without_own_prefixes(values), **plain)
        _check(batch, new_logps)
        microbatches.append(DumpedMicrobatch(row["rank"], batch, new_logps))
    return microbatches


def _cut(name: str, values: Tensor, rows: list[dict[str, Any]]) -> list[Tensor]:
    spec = _SPECS.get(name)
    axis = Axis.SLOT if spec is None else spec.axis
    pieces = list(values.split([row[axis] for row in rows]))
    if spec is None or spec.numbers is None:
        return pieces
    starts = _starts(spec.numbers, rows)
    return [piece - start for piece, start in zip(pieces, starts, strict=True)]


def _without_own_prefixes(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out prefixes that another microbatch has and this one does not."""
    prefixes = values.get("prefix_index")
    if prefixes is None or not torch.equal(prefixes, torch.arange(prefixes.numel())):
        return values
    return {name: value for name, value in values.items() if name != "prefix_index"}


def _read_fields(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are no tensors, as a batch has them."""
    stats: Metrics = {}
    for name, (kind, value, weight) in plain["stats"].items():
        stats[name] = _REDUCTIONS[kind](value, weight)
    ids = [(prompt_id, group_id) for prompt_id, group_id in plain["ids"]]
    return plain | {"stats": stats, "ids": ids}


def _check(batch: PackedBatch, new_logps: Tensor) -> None:
    """Check what the scoring relies on.

    Raises:
        ValueError: It does not hold.
    """
    sizes = _sizes(batch)
    for name, values in batch.tensors().items():
        axis = _SPECS[name].numbers
        if axis is not None and not _are_numbers(values, sizes[axis]):
            raise ValueError(f"{name} has a number beyond its {sizes[axis]} {axis}")
    if batch.loss_mask.dtype != torch.bool or not new_logps.is_floating_point():
        raise ValueError(f"loss_mask is {batch.loss_mask.dtype}, new_logps is {new_logps.dtype}")
    labelled = batch.document_index[batch.loss_mask]
    counts = torch.bincount(labelled, minlength=sizes[Axis.DOCUMENT])
    if not torch.equal(counts, batch.label_counts):
        raise ValueError("label_counts are not those of loss_mask")


def _are_numbers(values: Tensor, count: int) -> bool:
    """Whether all values lie in [0, count)."""
    if not values.numel():
        return True
    return int(values.min()) >= 0 and int(values.max()) < count
