"""The private and versioned names of other libraries that this pack uses, in this one place.

Each says in which version it was seen. What is imported where a name is used only once a command
needs it stays inside its function, so that this module is cheap to import.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.tensor import DTensor
from torchtune.config._errors import InstantiationError
from torchtune.config._parse import TuneRecipeArgumentParser
from torchtune.config._utils import _get_component_from_path, _merge_yaml_and_cli_args

__all__ = [
    "InstantiationError",
    "TuneRecipeArgumentParser",
    "all_gather_with_gradient",
    "component_from_path",
    "merge_overrides",
    "patch_stochastic_rounding",
]

# torch 2.13 has it by the first name, 2.11 by the second. Differentiable, known to torch.compile.
all_gather_with_gradient: Callable[..., Tensor] = (
    getattr(collectives, "all_gather_single_autograd", None)
    or collectives.all_gather_tensor_autograd
)


def component_from_path(path: str) -> Any:
    """Import the object that a dotted path names (torchtune 0.6.1, ``config._utils``).

    Raises:
        InstantiationError: The import fails; its cause says why.
    """
    return _get_component_from_path(path)


def merge_overrides(from_file: Namespace, overrides: Sequence[str]) -> DictConfig:
    """Merge ``key=value`` and ``~key`` into a config (torchtune 0.6.1, ``config._utils``)."""
    return _merge_yaml_and_cli_args(from_file, list(overrides))


def patch_stochastic_rounding() -> None:
    """Let torchao's ``bf16_stochastic_round`` take FSDP2's parameters; twice is as once.

    torchao 0.13 to 0.15 draws the random bits as a plain tensor, which a DTensor cannot be compared
    with (github.com/pytorch/ao/issues/2296). With this, each rank rounds its own shard.
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
            rounded,
            x.device_mesh,
            x.placements,
            run_check=False,
            shape=x.shape,  # given because shards can be uneven
            stride=x.stride(),
        )

    adam._fp32_to_bf16_sr = round_shard
