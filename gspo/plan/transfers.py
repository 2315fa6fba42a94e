"""The collectives of an optimizer step: what a rank receives, and how long that takes by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    for transfer in run.transfers[UPDATE]:
        total = _Total.of(transfer, 1)
        totals.append(total)
    if samples_here(cfg):
        share = 1 / cfg.sync_every_steps
        for transfer in run.transfers[SYNC]:
            total = _Total.of(transfer, share)
            totals.append(total)
    return [_describe(total, layout, machine) for total in totals]


def seconds_by_purpose(transfers: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of a step's collectives, added up by purpose."""
    purposes = [*_PURPOSES.values(), _OTHER]
    seconds = dict.fromkeys(purposes, 0.0)
    for transfer in transfers:
        purpose = transfer["purpose"]
        seconds[purpose] += transfer["seconds"]
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
        """Count a transfer so many times; a share of one is counted in part."""
        calls = transfer.calls * times
        num_bytes = transfer.num_bytes * times
        return cls(*transfer.key, calls, num_bytes)

    def plus(self, transfer: Transfer, times: float) -> _Total:
        """Return the total with a transfer of the same key, so many times."""
        more = _Total.of(transfer, times)
        calls = self.calls + more.calls
        num_bytes = self.num_bytes + more.num_bytes
        return replace(self, calls=calls, num_bytes=num_bytes)


def _microbatch_totals(run: DryRun, num_microbatches: int) -> Iterator[_Total]:
    """Yield the transfers of all microbatches; the last may send others."""
    num_earlier = num_microbatches - 1
    last = run.transfers[LAST_MICROBATCH]
    earlier = {}
    for transfer in run.transfers.get(MICROBATCH, last):
        earlier[transfer.key] = transfer
    for transfer in last:
        total = _Total.of(transfer, 1)
        repeated = earlier.pop(transfer.key, None)
        if repeated is not None:
            total = total.plus(repeated, num_earlier)
        yield total
    for transfer in earlier.values():  # in all but the last
        yield _Total.of(transfer, num_earlier)


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
    inside = _seconds(received, machine.link_gbps)
    between = _seconds(over_nodes, machine.node_link_gbps)
    purpose = _PURPOSES.get(total.purpose, _OTHER)
    return {
        "purpose": purpose,
        "kind": total.kind,
        "ranks": size,
        "nodes": nodes,
        "calls": total.calls,
        "received": received,
        "received_between_nodes": over_nodes,
        "seconds": max(inside, between),
    }


def _seconds(num_bytes: float, gbps: float) -> float:
    """Return the time of bytes over a link of so many 1e9 bits a second."""
    num_bits = num_bytes * 8
    rate = gbps * 1e9
    return num_bits / rate


def _ranks_in_a_node(total: _Total, layout: Layout, machine: Machine) -> int:
    """Return how many ranks of a group are in one node."""
    size = total.group_size
    in_node = machine.ranks_per_node
    is_between_replicas = total.kind == "all-reduce" and total.purpose == labels.REDUCING
    if is_between_replicas:
        # Replicas lie as far apart as a set of shards.
        num_replicas = in_node * layout.replicate_size // layout.world_size
        in_node = max(num_replicas, 1)
    return min(in_node, size)
