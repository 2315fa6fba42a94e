"""The collectives of an optimizer step: what a rank receives, and how long that takes by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gspo.config import Settings
from gspo.plan import memory_tracker as labels
from gspo.plan.dry_run import LAST_MICROBATCH, MICROBATCH, SYNC, UPDATE, DryRun
from gspo.plan.layout import Layout, samples_here
from gspo.plan.machine import Machine
from gspo.plan.memory_tracker import Transfer

_OTHER = "counts and norms"
_PURPOSES = {
    labels.GATHERING: "weights of layers and head",
    labels.REDUCING: "gradients",
    labels.KEYS: "keys and values",
    labels.SYNC: "weights for the sampler",
}


def step_transfers(
    cfg: Settings, layout: Layout, run: DryRun, machine: Machine
) -> list[dict[str, Any]]:
    """Return the collectives of a step by purpose, kind and group, in plain values."""
    totals = list(_microbatch_totals(run, layout.num_microbatches))
    totals += [_Total.of(transfer, 1) for transfer in run.transfers[UPDATE]]
    if samples_here(cfg):
        share = 1 / cfg.sync_every_steps
        totals += [_Total.of(transfer, share) for transfer in run.transfers[SYNC]]
    return [_describe(total, layout, machine) for total in totals]


def seconds_by_purpose(transfers: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of a step's collectives, added up by purpose."""
    seconds = {purpose: 0.0 for purpose in (*_PURPOSES.values(), _OTHER)}
    for transfer in transfers:
        seconds[transfer["purpose"]] += transfer["seconds"]
    return seconds


@dataclass(frozen=True, slots=True)
class _Total:
    """Collectives of one kind in a step."""

    purpose: str
    kind: str
    group_size: int
    calls: float
    num_bytes: float

    @classmethod
    def of(cls, transfer: Transfer, times: float) -> _Total:
        return cls(*transfer.key, transfer.calls * times, transfer.num_bytes * times)

    def plus(self, transfer: Transfer, times: float) -> _Total:
        calls = self.calls + transfer.calls * times
        num_bytes = self.num_bytes + transfer.num_bytes * times
        return _Total(self.purpose, self.kind, self.group_size, calls, num_bytes)


def _microbatch_totals(run: DryRun, num_microbatches: int) -> Iterator[_Total]:
    """Yield the transfers of all microbatches; the last may send others."""
    last = run.transfers[LAST_MICROBATCH]
    earlier = {transfer.key: transfer for transfer in run.transfers.get(MICROBATCH, last)}
    for transfer in last:
        total = _Total.of(transfer, 1)
        repeated = earlier.pop(transfer.key, None)
        if repeated is not None:
            total = total.plus(repeated, num_microbatches - 1)
        yield total
    for transfer in earlier.values():  # in all but the last
        yield _Total.of(transfer, num_microbatches - 1)


def _describe(total: _Total, layout: Layout, machine: Machine) -> dict[str, Any]:
    size = total.group_size
    num_bytes = total.num_bytes
    if total.kind == "all-reduce":
        num_bytes *= 2  # a reduce-scatter and an all-gather
    members = _ranks_in_a_node(total, layout, machine)
    nodes = -(-size // members)
    received = num_bytes * (size - 1) / size
    # Of a rank, where the ranks of a node share what comes in.
    over_nodes = num_bytes * (nodes - 1) / nodes / members
    inside = received * 8 / (machine.link_gbps * 1e9)
    between = over_nodes * 8 / (machine.node_link_gbps * 1e9)
    return {
        "purpose": _PURPOSES.get(total.purpose, _OTHER),
        "kind": total.kind,
        "ranks": size,
        "nodes": nodes,
        "calls": total.calls,
        "received": received,
        "received_between_nodes": over_nodes,
        "seconds": max(inside, between),
    }


def _ranks_in_a_node(total: _Total, layout: Layout, machine: Machine) -> int:
    """Return how many ranks of a group are in one node."""
    size, in_node = total.group_size, machine.ranks_per_node
    if total.kind == "all-reduce" and total.purpose == labels.REDUCING:
        # Replicas lie as far apart as a set of shards.
        return min(max(in_node * layout.replicate_size // layout.world_size, 1), size)
    return min(in_node, size)
