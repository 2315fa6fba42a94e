"""What optimizers of other libraries need to work on sharded parameters."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def mend_stochastic_rounding() -> None:
    """Lets torchao's ``bf16_stochastic_round`` take FSDP2's parameters; a second call changes nothing.

    Up to 0.15 torchao draws the random bits as a plain tensor, which a DTensor cannot be compared with
    (github.com/pytorch/ao/issues/2296). Here each rank rounds its own shard.
    """
    from torchao.optim import adam

    round_plain = adam._fp32_to_bf16_sr
    if round_plain.__module__ == __name__:
        return

    def round_shard(x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return round_plain(x)
        rounded = round_plain(x.to_local())
        return DTensor.from_local(
            rounded, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
        )  # the shape is given because shards can be uneven

    adam._fp32_to_bf16_sr = round_shard
