"""Context parallelism: the ranks among which the slots of a microbatch are split.

A document may lie on several of them, and only three things notice. Attention gathers keys and
values over the axis, which grouped-query attention keeps small; an objective completes its sums per
document; and the microbatch is drawn by one rank and handed to the others. The model's definition
does not change, and any number of heads will do.

Not here: the mesh (:mod:`gspo.parallel.mesh`), the split itself (:mod:`gspo.parallel.split`).
torch's own context parallelism is for one causal sequence or for FlexAttention alone, and knows no
prefix that documents share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class ContextAxis:
    """The ranks that hold the slots of one microbatch."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def complete(self, sums: Tensor) -> Tensor:
        """Add up what the ranks have; the gradient goes to this rank's part as it comes."""
        return _SumOverRanks.apply(sums, self.group)

    def gather(self, values: Tensor) -> Tensor:  # [...] -> [C, ...]
        """Return the tensors of all ranks, without gradients."""
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(gathered, values.detach().contiguous(), group=self.group)
        return torch.stack(gathered)

    def share(self, value: Any) -> Any:
        """Broadcast a picklable object from the axis's first rank."""
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0, device=torch.device("cpu"))
        return box[0]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = sums.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
