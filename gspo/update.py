"""The parts of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist

from gspo.policy.microbatch import Microbatch
from gspo.policy.model import Policy
from gspo.types import MetricSums


def accumulate_gradients(
    policy: Policy,
    microbatches: list[Microbatch],
    denominator: float,
    *,
    reduce_every_microbatch: bool = True,
) -> Iterator[MetricSums]:
    """The backwards of an optimizer step: leaves the gradient of ``loss sum over all ranks / denominator``.

    Args:
        policy: sharded, without gradients or with some to add to.
        microbatches: as many on every rank.
        denominator: from the totals of the whole step over all ranks, see the loss's ``denominator``.
        reduce_every_microbatch: False adds up unsharded gradients and reduces them once, in the last backward: fewer
            collectives for the memory of a full gradient on every rank.

    Yields:
        The metric sums of each microbatch, ``loss`` among them.
    """
    # FSDP2 averages gradients over the ranks; a sum over documents needs them added up.
    scale = dist.get_world_size() / denominator
    for i, microbatch in enumerate(microbatches):
        policy.set_requires_gradient_sync(reduce_every_microbatch or i == len(microbatches) - 1)
        loss_sum, pairs = policy(microbatch)
        (loss_sum * scale).backward()
        yield pairs | {"loss": (loss_sum.detach() / denominator, loss_sum.new_ones(()))}
