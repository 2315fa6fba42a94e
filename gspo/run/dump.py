"""One file per optimizer step with what its objective saw, which ``python -m gspo replay`` scores again.

A safetensors file: no pickle, readable anywhere. The microbatches of all data-parallel ranks stand in it one after
another as they were trained on, prefixes and padding included; numbers of documents and segments are shifted so that
they stay unique. A tensor has the name of its field in :class:`~gspo.types.PackedBatch`; ``new_logps`` are those of the
weights that the step's gradient was taken at. The metadata's entry ``gspo_dump`` is JSON.

Not here: entropies, which the objective takes from logits that are gone; weights; the scoring (:mod:`gspo.replay`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gspo import __version__
from gspo.errors import InputError
from gspo.types import PackedBatch

if TYPE_CHECKING:
    from gspo.parallel.context import ContextAxis
    from gspo.policy.microbatch import Microbatch
    from gspo.policy.model import Policy


VERSION = 1


_KEY = "gspo_dump"


_AXES = {  # what each tensor of a batch has one value of
    **dict.fromkeys(
        ("tokens", "labels", "positions", "document_index", "loss_mask", "old_logps"), "places"
    ),
    **dict.fromkeys(("ref_logps", "sampler_logps", "segment_index"), "places"),
    **dict.fromkeys(
        ("advantages", "rewards", "label_counts", "policy_version", "temperature"), "documents"
    ),
    "prefix_index": "documents",
    "segment_advantages": "segments",
}


_NUMBERS = {
    "document_index": "documents",
    "prefix_index": "documents",
    "segment_index": "segments",
}  # of what


_METADATA = {
    **dict.fromkeys(("step", "num_documents", "num_label_tokens", "seed"), int),
    **dict.fromkeys(("sampling", "config", "metrics"), dict),
}


_PLAIN = ("num_bins", "num_documents", "num_label_tokens", "ids", "stats", "rollout_continues")


@dataclass(frozen=True, slots=True)
class DumpedMicrobatch:
    """A whole microbatch of one data-parallel rank, on the CPU."""

    rank: int
    batch: PackedBatch
    new_logps: Tensor  # [T] float32 nats, 0 outside loss_mask


@dataclass(frozen=True, slots=True)
class Dump:
    """One optimizer step.

    ``metadata`` has ``step``, ``num_documents`` and ``num_label_tokens`` (the totals that the denominator is made of,
    dropped and quarantined documents included), ``sampling``, ``seed``, ``config`` (resolved) and ``metrics`` (what the
    step logs, as far as it is known before the weights change).
    """

    microbatches: list[DumpedMicrobatch]
    metadata: dict[str, Any]


def collect(
    policy: Policy, microbatches: list[Microbatch], context: ContextAxis
) -> list[DumpedMicrobatch]:  # of all ranks on the first, none elsewhere
    """The step's microbatches with the log-probabilities under the weights of now: one forward. Collective."""
    mine = []
    for microbatch in microbatches:
        new_logps = microbatch.shard.collect(policy.logps(microbatch), context).cpu()
        mine.append((new_logps, microbatch.whole(context)))
    ranks: list[Any] = [None] * dist.get_world_size()
    # Over the CPU's backend, which torch prefers for objects; the ranks of a context axis have the same.
    dist.gather_object(mine if context.rank == 0 else [], ranks if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return []
    drawn = enumerate(ranks[:: context.size])
    return [DumpedMicrobatch(rank, batch, logps) for rank, found in drawn for logps, batch in found]


def write(path: Path, dump: Dump) -> None:
    """Writes a dump; a file of that name is there whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    batches = [
        _filled(m.batch, [other.batch for other in dump.microbatches]) for m in dump.microbatches
    ]
    layouts = [_layout(batch) for batch in batches]
    tensors = {
        name: _joined(name, batches, layouts)
        for name in _AXES
        if getattr(batches[0], name) is not None
    }
    tensors["new_logps"] = torch.cat([m.new_logps for m in dump.microbatches])
    rows = [
        {"rank": m.rank, **sizes, "fields": {name: getattr(m.batch, name) for name in _PLAIN}}
        for m, sizes in zip(dump.microbatches, layouts, strict=True)
    ]
    text = json.dumps(
        {"version": VERSION, "gspo": __version__, **dump.metadata, "microbatches": rows}
    )
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(save(tensors, {_KEY: text}))  # save_file would let no one else read it
    temporary.replace(path)


def _joined(name: str, batches: list[PackedBatch], layouts: list[dict[str, int]]) -> Tensor:
    values = [getattr(batch, name) for batch in batches]
    if name in _NUMBERS:
        values = [x + start for x, start in zip(values, _starts(name, layouts), strict=True)]
    return torch.cat(values)


def _starts(name: str, layouts: list[dict[str, int]]) -> list[int]:
    """The first number that each microbatch has in the file, of what the tensor's values number."""
    return list(accumulate((sizes[_NUMBERS[name]] for sizes in layouts[:-1]), initial=0))


def _filled(batch: PackedBatch, all_batches: list[PackedBatch]) -> PackedBatch:
    """With what other batches of the step have and this does not: no prefixes, a segment for each document."""
    default: dict[str, Any] = {
        "prefix_index": torch.arange(batch.label_counts.numel()),
        "segment_index": batch.document_index,
        "segment_advantages": batch.advantages
        if batch.segment_index is None
        else _of_segments(batch),
    }
    absent = [name for name in default if getattr(batch, name) is None]
    return replace(
        batch,
        **{n: default[n] for n in absent if any(getattr(b, n) is not None for b in all_batches)},
    )


def _of_segments(batch: PackedBatch) -> Tensor:  # [K]
    """The advantage of each segment's document."""
    assert batch.segment_index is not None
    index, document = batch.segment_index[batch.loss_mask], batch.document_index[batch.loss_mask]
    advantages = batch.advantages.new_zeros(int(batch.segment_index.max()) + 1)
    return advantages.index_put((index,), batch.advantages[document])


def _layout(batch: PackedBatch) -> dict[str, int]:
    """How many of each axis a batch has; segments are those of its advantages or else those that its index names."""
    given, index = batch.segment_advantages, batch.segment_index
    segments = given.numel() if given is not None else 0 if index is None else int(index.max()) + 1
    return {
        "places": batch.tokens.numel(),
        "documents": batch.label_counts.numel(),
        "segments": segments,
    }


def read(path: Path) -> Dump:
    """The dump in a file.

    Raises:
        InputError: there is none, it is not whole, or another version has written it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read: {error}; give a whole file of a run's folder dumps, see dump_every_n_steps"
        ) from error
    try:
        metadata = _metadata(path, text)
        return Dump(_split(tensors, metadata.pop("microbatches")), metadata)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: is damaged: {error!r}; dump the step again") from error


def _metadata(path: Path, text: str | None) -> dict[str, Any]:
    if text is None:
        raise InputError(
            f"{path}: is not a dump of a step; give a file of a run's folder dumps, see dump_every_n_steps"
        )
    found = json.loads(text)
    if found["version"] != VERSION:
        raise InputError(
            f"{path}: is a dump of version {found['version']}, and this gspo reads version {VERSION}; "
            f"replay it with gspo {found['gspo']}, which wrote it"
        )
    for key, kind in _METADATA.items():
        if not isinstance(found[key], kind):
            raise ValueError(f"{key} is {found[key]!r}")
    return found


def _split(tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> list[DumpedMicrobatch]:
    parts = {
        name: values.split([row[_AXES.get(name, "places")] for row in rows])
        for name, values in tensors.items()
    }
    for name in _NUMBERS.keys() & parts.keys():
        parts[name] = tuple(
            x - start for x, start in zip(parts[name], _starts(name, rows), strict=True)
        )
    found = []
    for i, row in enumerate(rows):
        values: dict[str, Any] = {name: split[i] for name, split in parts.items()}
        if "prefix_index" in values and torch.equal(
            values["prefix_index"], torch.arange(row["documents"])
        ):
            del values["prefix_index"]  # another microbatch has prefixes
        ids = [(prompt, group) for prompt, group in row["fields"].pop("ids")]
        stats = {
            name: (value, weight) for name, (value, weight) in row["fields"].pop("stats").items()
        }
        new_logps = values.pop("new_logps")
        batch = PackedBatch(**values, **row["fields"], ids=ids, stats=stats)
        _check(batch, new_logps)
        found.append(DumpedMicrobatch(row["rank"], batch, new_logps))
    return found


def _check(batch: PackedBatch, new_logps: Tensor) -> None:
    """Raises ValueError where what the scoring relies on does not hold."""
    sizes = _layout(batch)
    for name, of in _NUMBERS.items():
        numbers = getattr(batch, name)
        if (
            numbers is not None
            and numbers.numel()
            and not 0 <= int(numbers.min()) <= int(numbers.max()) < sizes[of]
        ):
            raise ValueError(f"{name} has a number beyond its {sizes[of]} {of}")
    if batch.loss_mask.dtype != torch.bool or not new_logps.is_floating_point():
        raise ValueError(f"loss_mask is {batch.loss_mask.dtype}, new_logps is {new_logps.dtype}")
    counts = torch.bincount(batch.document_index[batch.loss_mask], minlength=sizes["documents"])
    if not torch.equal(counts, batch.label_counts):
        raise ValueError("label_counts are not those of loss_mask")
